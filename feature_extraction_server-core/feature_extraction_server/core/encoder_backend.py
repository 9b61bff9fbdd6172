"""Encoders of texts and images by onnxruntime, which is faster than torch on a CPU, where ENCODER_BACKEND says so.

    def add_settings(settings_manager):
        global checkpoint
        checkpoint = EncoderCheckpoint(settings_manager, "some_model", "owner/name")

    def load_model():
        global model
        model = checkpoint.load_model(AutoModel)
        checkpoint.speed_up(model, "last_hidden_state")

torch and onnxruntime are imported when something is loaded, not before.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from feature_extraction_server.core import torch_threads
from feature_extraction_server.core.checkpoints import Checkpoint, nothing_loading
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BACKENDS: Final = ("torch", "onnxruntime")
_PACKAGES: Final = ("onnxruntime", "onnx", "onnxscript")
#: How many tokens, or images, onnxruntime gets at once: more would take more memory, and as much time.
MAX_TOKENS: Final = 4096
MAX_IMAGES: Final = 16


class EncoderCheckpoint(Checkpoint):
    """The checkpoint of a model whose encoders compute with what the setting ``ENCODER_BACKEND`` names.

    Args: as of ``Checkpoint``.
    """

    def __init__(self, settings_manager: SettingsManager, model: str, default: str, **arguments: Any) -> None:
        super().__init__(settings_manager, model, default, **arguments)
        self._backend = settings_manager.add_setting(
            name="ENCODER_BACKEND",
            type=str,
            default="torch",
            choices=BACKENDS,
            description="What encoders of texts and images compute with; onnxruntime takes less time on a CPU",
        )

    def speed_up(self, encoder: Any, output: str, image_processor: Any = None) -> None:
        """Have an encoder compute with what the setting names, from now on; torch's weights of it are given back.

        With onnxruntime, several threads may call the encoder at once: a session's ``run`` may be called so.

        Args:
            encoder: a model of transformers, or one of its towers. It takes ``input_ids`` and ``attention_mask``, int64
                or boolean (n_texts, n_tokens), or ``pixel_values``, float32 (n_images, 3, height, width).
            output: what is needed of the encoder's answer, which with onnxruntime holds nothing else.
            image_processor: of an encoder of images; what it makes of any image is of one size.

        Raises:
            ModelLoadFailed: onnxruntime is not installed, does not run where the encoder is to, or cannot take it.
        """
        if self._backend.get() == "torch":
            return
        import torch

        asked = f"{self._backend.name}={self._backend.get()}"
        if self.device.type != "cpu" or self.dtype != torch.float32:
            raise ModelLoadFailed(f"{asked} runs on the CPU in float32: set DEVICE=cpu, and DTYPE=auto or float32")
        missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            raise ModelLoadFailed(
                f"{asked} needs the package {missing[0]}: pip install 'feature_extraction_server-core[onnxruntime]'"
            )
        if image_processor is None:
            tokens = torch.ones(2, 4, dtype=torch.int64)
            inputs = {"input_ids": tokens, "attention_mask": tokens.clone()}
        else:
            inputs = {"pixel_values": self.pixel_values(image_processor, [Image.new("RGB", (64, 64))] * 2)}
        started_at = time.monotonic()
        try:
            _take_over(encoder, output, inputs)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch's exporter and onnxruntime raise errors of all sorts
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
            raise ModelLoadFailed(f"{asked} cannot take {type(encoder).__name__}: {reason}") from error
        logger.info("onnxruntime took over %s in %.1f s", type(encoder).__name__, time.monotonic() - started_at)


def _take_over(encoder: Any, output: str, inputs: dict[str, torch.Tensor]) -> None:
    """Put onnxruntime in the place of an encoder's ``forward``."""
    with tempfile.TemporaryDirectory(prefix="encoder-") as folder:
        path = Path(folder) / "encoder.onnx"
        with nothing_loading(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' use of each other
            _export(encoder, output, inputs, path)
        for parameter in encoder.parameters():  # their device and precision stay known
            parameter.data = parameter.data.new_empty(0)
        session = _session(path)
    encoder.forward = _forward(session, output, tuple(inputs))


def _export(encoder: Any, output: str, inputs: dict[str, torch.Tensor], path: Path) -> None:
    """Write an encoder to a file as ONNX, for any number of texts of any length, or of images."""
    import torch

    class OneOutput(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, *values: torch.Tensor) -> Any:
            return getattr(self.encoder(**dict(zip(inputs, values, strict=True))), output)

    any_size = torch.export.Dim.DYNAMIC
    sizes = tuple({0: any_size} | ({1: any_size} if value.ndim == 2 else {}) for value in inputs.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
    with torch.no_grad():
        program = torch.onnx.export(
            OneOutput().eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            dynamic_shapes=(sizes,),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=True)  # which may be of any size, unlike what one file can hold


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch_threads.share()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else idle threads take others' cores
    options.add_session_config_entry("session.dynamic_block_base", "4")  # in finer parts, fewer wait
    options.enable_cpu_mem_arena = False  # it would keep for itself what its largest batch took
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _forward(session: Any, output: str, names: tuple[str, ...]) -> Callable[..., Any]:
    """Return what takes the place of an encoder's ``forward``, and takes as much of its arguments as it needs."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def forward(*values: torch.Tensor, **named: Any) -> Any:
        inputs = dict(zip(names, values, strict=False)) | named
        if inputs.get("attention_mask") is None and "attention_mask" in names:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        values = tuple(inputs[name] if name == "pixel_values" else inputs[name].long() for name in names)
        n_items = MAX_IMAGES if names == ("pixel_values",) else max(1, MAX_TOKENS // values[0].shape[1])
        runs = zip(*(value.split(n_items) for value in values), strict=True)
        answers = []
        for run in runs:
            (answer,) = session.run(None, {name: value.numpy() for name, value in zip(names, run, strict=True)})
            answers.append(torch.from_numpy(answer))
        return BaseModelOutputWithPooling(**{output: torch.cat(answers)})

    return forward
