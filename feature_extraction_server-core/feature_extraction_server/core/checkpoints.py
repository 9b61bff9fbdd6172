"""Checkpoints of transformers models: where they come from, which device and precision they run in.

    def add_settings(settings_manager):
        global checkpoint
        checkpoint = Checkpoint(settings_manager, "blip", "Salesforce/blip-image-captioning-base")

    def load_model():
        global model, processor
        from transformers import BlipForConditionalGeneration, BlipProcessor
        processor = checkpoint.load_processor(BlipProcessor)
        model = checkpoint.load_model(BlipForConditionalGeneration)

torch is imported when something is loaded, not before.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch

_DEVICE: Final = re.compile(r"auto|cpu|cuda(:\d+)?|mps")
DTYPES: Final = ("auto", "float32", "float16", "bfloat16")


class Checkpoint:
    """A model's checkpoint, by the settings ``{MODEL}_CHECKPOINT``, ``DEVICE`` and ``DTYPE``.

    Args:
        model: the model plugin's name.
        default: the checkpoint's name on the Hugging Face hub.
    """

    def __init__(self, settings_manager: SettingsManager, model: str, default: str) -> None:
        self._setting = settings_manager.add_setting(
            name=f"{model.upper()}_CHECKPOINT",
            type=str,
            default=default,
            description=f"The checkpoint of the model {model}: a name on the Hugging Face hub or a local folder",
        )
        self._device = settings_manager.add_setting(
            name="DEVICE",
            type=str,
            default="auto",
            description="Where models run; auto takes a GPU where there is one",
            pattern=_DEVICE.pattern,
        )
        self._dtype = settings_manager.add_setting(
            name="DTYPE",
            type=str,
            default="auto",
            choices=DTYPES,
            description="The precision models run in; auto is float16 on a CUDA GPU and float32 elsewhere",
        )

    @property
    def device(self) -> torch.device:
        """The device that DEVICE names or, for auto, the best there is.

        Raises:
            ModelLoadFailed: there is no such device here.
        """
        import torch

        name = self._device.get()
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = torch.device(name)
        n_devices = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (device.index or 0) >= n_devices[device.type]:
            raise ModelLoadFailed(f"DEVICE={name}: this machine has no such device")
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that DTYPE names or, for auto, the device's own."""
        import torch

        name = self._dtype.get()
        if name == "auto":
            name = "float16" if self.device.type == "cuda" else "float32"
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def load_processor(self, processor_class: Any, **arguments: Any) -> Any:
        """Load a processor, tokenizer or configuration by its ``from_pretrained``."""
        return self._load(processor_class, arguments)

    def load_model(self, model_class: Any, **arguments: Any) -> Any:
        """Load a model by its ``from_pretrained``, for inference, in ``dtype`` on ``device``."""
        model = self._load(model_class, {"dtype": self.dtype} | arguments)
        return model.to(self.device).eval()

    def _load(self, loaded_class: Any, arguments: dict[str, Any]) -> Any:
        name = self._setting.get()
        try:
            return loaded_class.from_pretrained(name, **arguments)
        except OSError as error:
            raise ModelLoadFailed(self._explain(name, error)) from error

    def _explain(self, name: str, error: OSError) -> str:
        setting = self._setting.name
        if Path(name).is_dir():
            return f"the checkpoint folder {setting}={name} is incomplete: {_first_sentence(error)}"
        if Path(name).is_absolute() or name.startswith("."):
            return f"the checkpoint folder {setting}={name} does not exist"
        return (
            f"the checkpoint {setting}={name} is not cached, and it could not be had from the Hugging Face hub "
            f"({_first_sentence(error)}); connect to the hub, or set {setting} to a local folder"
        )


def _first_sentence(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:300].rstrip(".")
