from __future__ import annotations

from pathlib import Path

from feature_extraction_server.core.progress import Download


def test_download_counts_whole_files_and_parts_of_files(tmp_path: Path) -> None:
    (tmp_path / "aaa").write_bytes(bytes(10))
    (tmp_path / "bbb.1f.incomplete").write_bytes(bytes(15))

    told = Download(tmp_path, {"aaa": 10, "bbb": 40, "ccc": 50}).told()

    assert told == {"stage": "downloading", "bytes_done": 25, "bytes_total": 100}


def test_download_does_not_count_what_a_broken_attempt_left_twice(tmp_path: Path) -> None:
    (tmp_path / "bbb.1f.incomplete").write_bytes(bytes(15))
    (tmp_path / "bbb.2e.incomplete").write_bytes(bytes(5))
    (tmp_path / "bbb.3d.incomplete").write_bytes(bytes(60))

    told = Download(tmp_path, {"bbb": 40}).told()

    assert told["bytes_done"] == 40


def test_download_does_not_count_room_that_is_reserved_but_not_written(tmp_path: Path) -> None:
    with (tmp_path / "aaa.incomplete").open("wb") as file:
        file.truncate(1_000_000)

    assert Download(tmp_path, {"aaa": 1_000_000}).told()["bytes_done"] == 0


def test_download_has_nothing_before_its_folder_is_there(tmp_path: Path) -> None:
    assert Download(tmp_path / "none", {"aaa": 5}).told()["bytes_done"] == 0
