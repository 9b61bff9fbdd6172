"""Pictures in shared memory: they arrive as they were and stay so, and nothing stays behind."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from feature_extraction_server.core import pixels

MIB = 1 << 20


#: Of a region that is kept: its own, and one that its mapping has.
FILES = 2


@pytest.fixture(autouse=True)
def no_regions_of_other_tests() -> Iterator[None]:
    pixels._kept.clear()
    yield
    pixels._kept.clear()


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def jpeg(picture: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return file


def opened(picture: Image.Image) -> Image.Image:
    return Image.open(jpeg(picture))


def hand_over(*pictures: Image.Image) -> pixels.Region:
    region, in_use = pixels.share(list(pictures))
    region.hand_over()
    del in_use
    return region


def receive(region: pixels.Region, *sizes: tuple[int, int]) -> list[Image.Image]:
    picture = pixels.pictures_in(pixels.map_region(os.dup(region.file_descriptor)))
    return [picture(*size) for size in sizes]


def look(picture: Image.Image) -> tuple[str, tuple[int, int], bytes]:
    return picture.mode, picture.size, picture.tobytes()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((1, 1), id="one pixel"),
        pytest.param((997, 613), id="odd sides"),
        pytest.param((3000, 2000), id="more than one of Pillow's blocks"),
    ],
)
def test_a_picture_arrives_as_it_was(size: tuple[int, int]) -> None:
    picture = noise(*size)

    (found,) = receive(hand_over(picture), size)

    assert look(found) == look(picture)


def test_pictures_of_all_sizes_arrive_in_one_region() -> None:
    sizes = [(3, 5), (640, 480), (1, 1), (31, 7)]
    pictures = [noise(*size) for size in sizes]

    found = receive(hand_over(*pictures), *sizes)

    assert list(map(look, found)) == list(map(look, pictures))


def test_a_picture_that_is_decoded_in_a_region_is_not_copied_to_another() -> None:
    file = jpeg(noise(64, 48))
    picture = Image.open(file)
    pixels.decode_in_region(picture)
    picture.load()
    (region,) = pixels._kept

    assert hand_over(picture) is region
    (found,) = receive(region, picture.size)
    assert look(found) == look(picture) == look(Image.open(file))


def test_a_picture_that_has_left_its_region_is_copied() -> None:
    picture = opened(noise(64, 48))
    pixels.decode_in_region(picture)
    picture.load()
    picture.paste("red", (0, 0, 64, 48))
    picture.im = picture.im.copy()

    (found,) = receive(hand_over(picture), picture.size)

    assert found.getpixel((5, 5)) == (255, 0, 0)


def test_a_picture_that_is_sent_twice_is_copied_the_second_time() -> None:
    picture = opened(noise(64, 48))
    pixels.decode_in_region(picture)
    picture.load()

    first, second = hand_over(picture), hand_over(picture)

    assert first is not second
    assert look(receive(second, picture.size)[0]) == look(picture)


def test_a_region_is_used_again_when_neither_side_has_a_picture_in_it() -> None:
    sent = noise(8, 8)
    first = hand_over(sent)
    found = receive(first, (8, 8))

    second = hand_over(sent)
    found.clear()
    third = hand_over(sent)

    assert second is not first
    assert third is first


def test_regions_that_are_not_used_give_their_memory_back_until_they_are_used_again() -> None:
    sent = noise(800, 600)
    region = hand_over(sent)
    found = receive(region, sent.size)

    given_back = [pixels.give_back_unused(0)]
    found.clear()
    given_back += [pixels.give_back_unused(60), pixels.give_back_unused(0), pixels.give_back_unused(0)]

    assert given_back == [False, False, True, False]
    assert os.fstat(region.file_descriptor).st_blocks == 0
    assert hand_over(sent) is region
    assert look(receive(region, sent.size)[0]) == look(sent)


def test_a_picture_stays_as_it_was_as_long_as_somebody_has_it() -> None:
    (red,) = receive(hand_over(Image.new("RGB", (8, 8), "red")), (8, 8))
    part = red.crop((0, 0, 4, 4))
    for _ in range(3):
        receive(hand_over(Image.new("RGB", (8, 8), "blue")), (8, 8))

    assert red.getpixel((4, 4)) == part.getpixel((1, 1)) == (255, 0, 0)


def test_a_picture_may_be_changed_like_any_other() -> None:
    sent = Image.new("RGB", (8, 8), "red")
    (found,) = receive(hand_over(sent), (8, 8))

    found.putpixel((1, 1), (1, 2, 3))
    found.paste("blue", (4, 4, 8, 8))

    assert [found.getpixel(place) for place in [(0, 0), (1, 1), (5, 5)]] == [(255, 0, 0), (1, 2, 3), (0, 0, 255)]
    assert sent.getpixel((1, 1)) == (255, 0, 0)


def test_a_picture_that_is_never_sent_gives_its_region_back() -> None:
    picture = opened(noise(64, 48))
    pixels.decode_in_region(picture)
    (region,) = pixels._kept
    in_use = region.is_free

    del picture

    assert (in_use, region.is_free) == (False, True)


def test_a_region_whose_receiver_has_gone_is_not_used_again() -> None:
    region = hand_over(noise(8, 8))
    pixels.forget(region)

    assert hand_over(noise(8, 8)) is not region


def test_a_larger_picture_gets_a_larger_region() -> None:
    hand_over(noise(8, 8))

    assert len(hand_over(noise(2000, 1500))) >= pixels.n_bytes((2000, 1500))


def test_regions_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "MAX_KEPT_BYTES", 10 * MIB)
    before = open_files()

    regions = [hand_over(noise(8, 8)) for _ in range(4)]  # of 4 MiB

    found = [receive(region, (8, 8)) for region in regions]
    used_again = [pixels.is_used_again(pixels.map_region(os.dup(region.file_descriptor))) for region in regions]
    assert used_again == [True, True, False, False]
    del regions
    found.clear()
    assert open_files() == before + 2 * FILES


def test_one_that_is_too_small_makes_room_for_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "MAX_KEPT_BYTES", 10 * MIB)
    for _ in range(2):
        receive(hand_over(noise(8, 8)), (8, 8))

    hand_over(noise(1600, 1400))

    assert [len(region) > 8 * MIB for region in pixels._kept] == [True]


def test_many_pictures_at_once_take_no_file_descriptor_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "MAX_KEPT_BYTES", 10 * MIB)
    before = open_files()
    pictures: list[Any] = [opened(noise(8, 8)) for _ in range(9)]

    for picture in pictures:
        pixels.decode_in_region(picture)
        picture.load()

    assert open_files() == before + 2 * FILES
    found = receive(hand_over(*pictures), *[(8, 8)] * 9)
    assert list(map(look, found)) == list(map(look, pictures))


def test_a_forked_process_has_regions_of_its_own() -> None:
    hand_over(noise(8, 8))

    pid = os.fork()
    if pid == 0:
        os._exit(len(pixels._kept))

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
