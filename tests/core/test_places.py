"""Numbers that processes share out among themselves."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from feature_extraction_server.core.places import take_place

pytestmark = pytest.mark.usefixtures("places_given_back")


def test_the_smallest_number_that_nobody_has_is_taken(tmp_path: Path) -> None:
    assert [take_place(tmp_path, "place") for _ in range(3)] == [0, 1, 2]
    assert take_place(tmp_path, "other") == 0


def test_files_that_cannot_be_locked_are_an_error_not_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)

    with pytest.raises(OSError, match="No locks"):
        take_place(tmp_path, "place")
