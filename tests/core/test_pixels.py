"""Pictures in shared memory: they arrive as they were, and nothing stays behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from PIL import Image

from feature_extraction_server.core import pixels
from feature_extraction_server.core.cores import N_CORES


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


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
def test_a_picture_is_read_as_it_was_written(size: tuple[int, int]) -> None:
    picture = noise(*size)

    with pixels.region(pixels.n_bytes(size)) as region:
        region.write(picture)
        memory = pixels.map_region(os.dup(region.file_descriptor))
        found = pixels.read(memory, size)

    assert (found.mode, found.size, found.tobytes()) == ("RGB", size, picture.tobytes())


def test_what_was_read_does_not_change_with_the_region() -> None:
    with pixels.region(pixels.n_bytes((8, 8))) as region:
        region.write(Image.new("RGB", (8, 8), "red"))
        found = pixels.read(pixels.map_region(os.dup(region.file_descriptor)), (8, 8))
        region.write(Image.new("RGB", (8, 8), "blue"))

    assert found.getpixel((4, 4)) == (255, 0, 0)


def test_a_region_is_lent_again() -> None:
    with pixels.region(1000) as first:
        pass
    with pixels.region(2000) as second:
        pass

    assert second is first


def test_a_larger_picture_gets_a_larger_region() -> None:
    with pixels.region(1000):
        pass

    with pixels.region(9 << 20) as region:
        assert len(region) >= 9 << 20


def test_a_very_large_region_is_given_back_at_once() -> None:
    before = open_files()

    with pixels.region(pixels.MAX_KEPT_BYTES + 1):
        pass

    assert open_files() <= before


def test_a_region_that_the_other_process_may_still_read_is_not_lent_again() -> None:
    lent = []

    def fail() -> None:
        with pixels.region(1000) as region:
            lent.append(region)
            raise TimeoutError

    with pytest.raises(TimeoutError):
        fail()
    with pixels.region(1000) as region:
        assert region is not lent[0]


def test_no_more_regions_are_lent_than_there_are_cores() -> None:
    all_lent = threading.Barrier(N_CORES + 1)
    give_back = threading.Event()
    one_more = threading.Event()

    def borrow() -> None:
        with pixels.region(1000):
            all_lent.wait(20)
            give_back.wait(20)

    def borrow_one_more() -> None:
        with pixels.region(1000):
            one_more.set()

    threads = [threading.Thread(target=borrow) for _ in range(N_CORES)]
    for thread in threads:
        thread.start()
    all_lent.wait(20)
    threads.append(threading.Thread(target=borrow_one_more))
    threads[-1].start()

    assert not one_more.wait(0.1)
    give_back.set()
    assert one_more.wait(20)
    for thread in threads:
        thread.join(20)
