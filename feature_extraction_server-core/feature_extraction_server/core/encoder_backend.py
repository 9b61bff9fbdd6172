"""Encoders of texts by onnxruntime, which is faster than torch for single texts on a CPU, by ENCODER_BACKEND.

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

from feature_extraction_server.core import torch_threads
from feature_extraction_server.core.checkpoints import Checkpoint, nothing_loading
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BACKENDS: Final = ("torch", "onnxruntime")
_PACKAGES: Final = ("onnxruntime", "onnx", "onnxscript")
#: How many tokens onnxruntime gets at once, unless a single text has more: more would take more memory.
MAX_TOKENS: Final = 4096


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
            description="What encoders of texts compute with; onnxruntime takes less time for single texts on a CPU",
        )

    def speed_up(self, encoder: Any, output: str) -> None:
        """Have an encoder compute with what the setting names, from now on; torch's weights of it are given back.

        With onnxruntime, several threads may call the encoder at once: a session's ``run`` may be called so.

        Args:
            encoder: a model of transformers, or one of its towers, that takes ``input_ids`` and ``attention_mask``, of
                integers or booleans (n_texts, n_tokens).
            output: what is needed of the encoder's answer, which with onnxruntime holds nothing else.

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
        started_at = time.monotonic()
        try:
            _take_over(encoder, output)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch's exporter and onnxruntime raise errors of all sorts
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
            raise ModelLoadFailed(f"{asked} cannot take {type(encoder).__name__}: {reason}") from error
        logger.info("onnxruntime took over %s in %.1f s", type(encoder).__name__, time.monotonic() - started_at)


def _take_over(encoder: Any, output: str) -> None:
    """Put onnxruntime in the place of an encoder's ``forward``."""
    with tempfile.TemporaryDirectory(prefix="encoder-") as folder:
        path = Path(folder) / "encoder.onnx"
        with nothing_loading(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' use of each other
            _export(encoder, output, path)
        for parameter in encoder.parameters():  # their device and precision stay known
            parameter.data = parameter.data.new_empty(0)
        session = _session(path)
    encoder.forward = _forward(session, output)


def _export(encoder: Any, output: str, path: Path) -> None:
    """Write an encoder to a file as ONNX, for any number of texts of any length."""
    import torch

    class OneOutput(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return getattr(self.encoder(input_ids=input_ids, attention_mask=attention_mask), output)

    tokens = torch.ones(2, 4, dtype=torch.int64)
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
    with torch.no_grad():
        program = torch.onnx.export(
            OneOutput().eval(),
            (tokens, tokens.clone()),
            input_names=["input_ids", "attention_mask"],
            dynamic_shapes=(any_size, any_size),
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


def _forward(session: Any, output: str) -> Callable[..., Any]:
    """Return what takes the place of an encoder's ``forward``; of its other arguments it needs none."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        n_texts = max(1, MAX_TOKENS // input_ids.shape[1])
        parts = []
        for start in range(0, len(input_ids), n_texts):
            some = slice(start, start + n_texts)
            inputs = {"input_ids": input_ids[some].numpy(), "attention_mask": mask[some].numpy()}
            parts.append(torch.from_numpy(session.run(None, inputs)[0]))
        answer: Any = {output: torch.cat(parts)}
        return BaseModelOutputWithPooling(**answer)

    return forward
