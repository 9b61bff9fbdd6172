"""Checkpoints of transformers models: where they come from, which device and precision they run in.

    def add_settings(settings_manager):
        global checkpoint
        checkpoint = Checkpoint(settings_manager, "blip", "Salesforce/blip-image-captioning-base")

    def load_model():
        global model, tokenizer
        from transformers import AutoTokenizer, BlipForConditionalGeneration
        tokenizer = checkpoint.load_processor(AutoTokenizer)
        model = checkpoint.load_model(BlipForConditionalGeneration)

torch is imported when something is loaded, not before.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_DEVICE: Final = re.compile(r"auto|cpu|cuda(:\d+)?|mps")
HUB_TIMEOUT_S: Final = 3
#: The environment variable that tells a model's process which of the model's replicas it is.
REPLICA_VARIABLE: Final = "MODEL_REPLICA"
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
        """The device that DEVICE names or, for auto, the best there is; of several GPUs, a replica's own.

        Raises:
            ModelLoadFailed: there is no such device here.
        """
        import torch

        name = self._device.get()
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cuda" and torch.cuda.device_count() > 1:  # a model's replicas take the GPUs in turn
            name = f"cuda:{int(os.environ.get(REPLICA_VARIABLE, 0)) % torch.cuda.device_count()}"
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
        """Load a processor, a tokenizer or a configuration by its ``from_pretrained``.

        Raises:
            ModelLoadFailed: there is none, or it is broken.
        """
        return self._load(processor_class, arguments)

    def load_model(self, model_class: Any, *, may_lack: tuple[str, ...] = (), **arguments: Any) -> Any:
        """Load a model by its ``from_pretrained``, for inference, in ``dtype`` on ``device``.

        Args:
            model_class: one of transformers' classes.
            may_lack: beginnings of the names of weights that a checkpoint may lack, since they do not matter.
            arguments: more arguments of ``from_pretrained``.

        Raises:
            ModelLoadFailed: there is no such checkpoint, it is broken, or it is another model's.
        """
        device = self.device  # first of all: a device that is not there should not cost a download
        model, report = self._load(model_class, {"dtype": self.dtype, "output_loading_info": True} | arguments)
        missing = sorted(name for name in report["missing_keys"] if not name.startswith(may_lack))
        if missing:  # transformers would go on with random weights
            raise ModelLoadFailed(
                f"the checkpoint {self._setting.name}={self._setting.get()} lacks {len(missing)} of the weights of "
                f"{model_class.__name__}, such as {missing[0]}"
            )
        return model.to(device).eval()

    def pixel_values(self, image_processor: Any, images: list[Image]) -> torch.Tensor:
        """Return what an image processor makes of images, (n_images, 3, height, width), as the model takes it."""
        pixels: torch.Tensor = image_processor(images, return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.dtype)

    def _load(self, loaded_class: Any, arguments: dict[str, Any]) -> Any:
        import torch
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
        name = self._setting.get()
        from_hub = _hub_is_needed(name)
        try:
            return loaded_class.from_pretrained(name, local_files_only=not from_hub, **arguments)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # on a broken file, transformers and its parsers raise errors of all sorts
            raise ModelLoadFailed(self._explain(name, from_hub, _first_sentence(error))) from error

    def _explain(self, name: str, from_hub: bool, reason: str) -> str:
        setting = self._setting.name
        if Path(name).is_dir():
            return f"the checkpoint in the folder {setting}={name} is incomplete or broken: {reason}"
        if Path(name).is_absolute() or name.startswith("."):
            return f"the checkpoint folder {setting}={name} does not exist"
        if from_hub:
            return f"the checkpoint {setting}={name} could not be had from the Hugging Face hub: {reason}"
        return (
            f"the checkpoint {setting}={name} is neither a folder nor in the cache, and the Hugging Face hub cannot be "
            f"reached; connect to the hub, or set {setting} to a folder"
        )


def _hub_is_needed(name: str) -> bool:
    """Tell whether a checkpoint is to be looked for on the hub: it is no folder, and the hub can be reached.

    Asked once and briefly, since transformers would ask for every file, and for half a minute each.
    """
    from huggingface_hub import constants, get_session

    if Path(name).is_dir():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # no network, a proxy that refuses, offline mode: each has its own class
        logger.info("The Hugging Face hub cannot be reached (%s); only what is cached can be loaded", error)
        return False
    return True


def _first_sentence(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:300].rstrip(".")
