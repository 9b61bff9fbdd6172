from __future__ import annotations

import numpy as np

from feature_extraction_server.core.speech import SAMPLING_RATE, windows


def test_windows_cover_a_recording_and_are_cut_where_it_is_quiet() -> None:
    samples = np.random.default_rng(0).normal(0, 0.2, 100 * SAMPLING_RATE).astype(np.float32)
    quiet = [(27.0, 27.5), (51.0, 51.5), (76.0, 76.5)]
    for begin, end in quiet:
        samples[int(begin * SAMPLING_RATE) : int(end * SAMPLING_RATE)] = 0

    starts, parts = zip(*windows(samples), strict=True)

    cuts = np.cumsum([len(part) for part in parts])[:-1] / SAMPLING_RATE
    np.testing.assert_array_equal(np.concatenate(parts), samples)
    assert list(starts) == [0, *cuts]
    assert all(begin < cut < end for (begin, end), cut in zip(quiet, cuts, strict=True))
