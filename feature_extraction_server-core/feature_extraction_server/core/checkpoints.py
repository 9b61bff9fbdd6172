"""Checkpoints: where they come from, which device and precision they run in.

Of a model of transformers:

    def add_settings(settings_manager):
        global checkpoint
        checkpoint = Checkpoint(settings_manager, "blip", "Salesforce/blip-image-captioning-base")

    def load_model():
        global model, tokenizer
        from transformers import AutoTokenizer, BlipForConditionalGeneration
        tokenizer = checkpoint.load_processor(AutoTokenizer)
        model = checkpoint.load_model(BlipForConditionalGeneration)

Of a model of another library, ``loading`` gives the folder of the files, which ``Checkpoint`` was told:

    checkpoint = Checkpoint(settings_manager, "some_model", "owner/name", files=("config.json", "model.bin"))

    with checkpoint.loading() as folder:
        model = SomeLibrary(folder / "model.bin")

torch is imported when something is loaded, not before.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from feature_extraction_server.core import torch_threads
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.progress import Download, report
from feature_extraction_server.core.settings import Setting, SettingsManager

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_DEVICE: Final = re.compile(r"auto|cpu|cuda(:\d+)?|mps")
HUB_TIMEOUT_S: Final = 3
#: The environment variable that tells a model's process which of the model's replicas it is.
REPLICA_VARIABLE: Final = "MODEL_REPLICA"
DTYPES: Final = ("auto", "float32", "float16", "bfloat16")
#: Of the files on the hub those that transformers reads besides the weights, and the weights: the first kind there is.
_SMALL_FILES: Final = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS: Final = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
_loads: Final = threading.Condition()
_n_loads = 0
_client_lock: Final = threading.Lock()
_client_is_set = False


class Checkpoint:
    """A model's checkpoint, by the settings ``{MODEL}_CHECKPOINT``, ``{MODEL}_REVISION``, ``DEVICE`` and ``DTYPE``.

    Args:
        model: the model plugin's name.
        default: the checkpoint's name on the Hugging Face hub.
        revision: which of the hub's revisions is the default.
        files: patterns, as of a shell, of the files that the model needs; by default those that transformers reads.
        token: the setting with the token that the hub wants to see, if it is not ``HF_TOKEN``.
    """

    def __init__(
        self,
        settings_manager: SettingsManager,
        model: str,
        default: str,
        *,
        revision: str = "main",
        files: Sequence[str] = (),
        token: Setting[str] | None = None,
    ) -> None:
        self._files = tuple(files)
        self._token = token
        self._loaded_revision: str | None = None
        self._setting = settings_manager.add_setting(
            name=f"{model.upper()}_CHECKPOINT",
            type=str,
            default=default,
            description=f"The checkpoint of the model {model}: a name on the Hugging Face hub or a local folder",
        )
        self._revision = settings_manager.add_setting(
            name=f"{model.upper()}_REVISION",
            type=str,
            default=revision,
            description=f"Which revision of the checkpoint of the model {model} is taken from the Hugging Face hub: a "
            "branch, a tag or a commit",
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

        n_mps = int(torch.backends.mps.is_available())
        return torch.device(self.device_among({"cuda": torch.cuda.device_count(), "mps": n_mps}))

    def device_among(self, n_devices: Mapping[str, int]) -> str:
        """Return the device that DEVICE names or, for auto, the best there is; of several GPUs, a replica's own.

        Args:
            n_devices: how many devices of each kind a library can use here, the best kind first; cpu need not be told.

        Raises:
            ModelLoadFailed: there is no such device among them.
        """
        name: str = self._device.get()
        if name == "auto":
            name = next((kind for kind, n in n_devices.items() if n), "cpu")
        if name == "cuda" and n_devices["cuda"] > 1:  # a model's replicas take the GPUs in turn
            name = f"cuda:{int(os.environ.get(REPLICA_VARIABLE, 0)) % n_devices['cuda']}"
        kind, _, number = name.partition(":")
        if kind != "cpu" and int(number or 0) >= n_devices.get(kind, 0):
            raise ModelLoadFailed(f"DEVICE={name}: the model can use no such device here")
        return name

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

    def pixel_values(self, image_processor: Any, images: Sequence[Image]) -> torch.Tensor:
        """Return what an image processor makes of images, (n_images, 3, height, width), as the model takes it."""
        pixels: torch.Tensor = image_processor(images, return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.dtype)

    def encode_images(
        self, encode: Callable[[torch.Tensor], torch.Tensor], image_processor: Any, images: Sequence[Image]
    ) -> torch.Tensor:
        """Return what an encoder makes of images, (n_images, ...); on the CPU, each core takes its share of them.

        Args:
            encode: takes pixel values, (n, 3, height, width), and returns (n, ...).
            image_processor: makes the pixel values, all of one size.
            images: RGB.
        """
        import torch

        def encode_some(some: Sequence[Image]) -> torch.Tensor:
            with torch.inference_mode():
                return encode(self.pixel_values(image_processor, some))

        if self.device.type != "cpu":
            return encode_some(images)
        return torch.cat(torch_threads.in_parallel(encode_some, torch_threads.split(images)))

    def provenance(self) -> dict[str, str]:
        """Return where the answers of the loaded model come from: ``checkpoint``, ``revision``, ``dtype``, ``device``.

        The revision is the commit on the hub, or ``local`` for a folder.
        """
        return {
            "checkpoint": self.name,
            "revision": self.revision,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }

    @property
    def revision(self) -> str:
        """The commit on the hub of what is loaded, ``local`` for a folder; before it is loaded, the one that is set."""
        revision: str = self._loaded_revision or self._revision.get()
        return revision

    @property
    def wanted_dtype(self) -> str:
        """What DTYPE says, ``auto`` included: for libraries other than torch."""
        name: str = self._dtype.get()
        return name

    @property
    def name(self) -> str:
        """The name on the hub or the folder that ``{MODEL}_CHECKPOINT`` gives."""
        name: str = self._setting.get()
        return name

    @property
    def is_local(self) -> bool:
        """Whether the checkpoint is a folder, not one of the hub's."""
        name = self.name
        return Path(name).is_dir() or Path(name).is_absolute() or name.startswith(".")

    def local_files(self) -> list[Path]:
        """Return what the model needs of the files in a local folder; nothing of a checkpoint on the hub."""
        folder = Path(self.name)
        if not folder.is_dir():
            return []
        paths = folder.rglob("*") if self._files else folder.iterdir()
        try:
            return list(self._wanted({str(path.relative_to(folder)): path for path in paths}).values())
        except FileNotFoundError:
            return []

    def download(self) -> Path:
        """Return the folder with the checkpoint's files, once those that are not there have come from the hub.

        Where the hub cannot be reached, it is what the cache has of the checkpoint, which may not be all of it. Where
        the hub is reached but cannot answer, it is what the cache has, unless that is known not to be all of it.

        Raises:
            ModelLoadFailed: there is no such checkpoint, or the hub cannot answer and the cache lacks some of it.
        """
        name, setting = self.name, self._setting.name
        if self.is_local:
            if not Path(name).is_dir():
                raise ModelLoadFailed(f"the checkpoint folder {setting}={name} does not exist")
            self._loaded_revision = "local"
            return Path(name)
        if _hub_can_be_reached():
            from huggingface_hub.utils.tqdm import disable_progress_bars

            disable_progress_bars()
            try:
                folder = self.pull()
            except ModelLoadFailed as failure:
                if not _hub_is_down(failure.__cause__) or (cached := self._whole_in_cache()) is None:
                    raise
                logger.warning("%s; what is cached is loaded", failure.message)
                folder = cached
        else:
            folder = self._cached()
        self._loaded_revision = folder.name  # the cache names the folder so
        return folder

    def pull(self) -> Path:
        """Have the cache get what it lacks of the checkpoint's files from the hub, and return their folder there.

        Raises:
            ModelLoadFailed: they could not be had.
        """
        try:
            return self._pull()
        except Exception as error:  # the network, the disk and the hub each have errors of all sorts
            reason = f"could not be had from the Hugging Face hub: {_why_not_had(error)}"
            raise ModelLoadFailed(f"the checkpoint {self._named()} {reason}") from error

    @contextmanager
    def loading(self) -> Iterator[Path]:
        """Give the folder with the checkpoint's files, to load them from within the block.

        Raises:
            ModelLoadFailed: there is no such checkpoint; or whatever the block raises, but for lack of memory.
        """
        folder = self.download()
        try:
            yield folder
        except (MemoryError, ModelLoadFailed):
            raise
        except Exception as error:  # on a broken file, the libraries and their parsers raise errors of all sorts
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be there
                raise
            place = f"in the folder {self._named()}" if self.is_local else self._named()
            reason = f"is incomplete or broken: {_first_sentence(error)}"
            raise ModelLoadFailed(f"the checkpoint {place} {reason}") from error

    def _load(self, loaded_class: Any, arguments: dict[str, Any]) -> Any:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        with self.loading() as folder, _one_more_loading():
            return loaded_class.from_pretrained(str(folder), **arguments)

    def _pull(self) -> Path:
        from huggingface_hub import HfApi, constants, snapshot_download
        from huggingface_hub.file_download import repo_folder_name

        _give_requests_a_timeout()
        name, revision = self.name, self._revision.get()
        token = self._token.get() if self._token else None
        files = HfApi().model_info(name, revision=revision, files_metadata=True, token=token).siblings or []
        wanted = self._wanted({file.rfilename: file for file in files})
        blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "blobs"
        sizes = {
            blob: file.size or 0 for file in wanted.values() if (blob := file.lfs.sha256 if file.lfs else file.blob_id)
        }
        report.get()(Download(blobs, sizes))
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted), token=token))
        finally:
            report.get()(None)

    def _wanted(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """Choose by their names what the model needs of the files that the hub has."""
        patterns = self._files
        if not patterns:
            names = [name for name in files if "/" not in name]
            first = next((kind for kind in _WEIGHTS if any(fnmatch(name, kind[-1]) for name in names)), ())
            files = {name: files[name] for name in names if name in first or not name.endswith(".index.json")}
            patterns = _SMALL_FILES + first
        wanted = {name: file for name, file in files.items() if any(fnmatch(name, pattern) for pattern in patterns)}
        if not wanted:
            raise FileNotFoundError("it has none of the files that the model needs")
        return wanted

    def _cached(self) -> Path:
        from huggingface_hub import snapshot_download

        try:
            # With the patterns of the files, the cache's folder would be refused where there is not all of them.
            return Path(
                snapshot_download(self.name, revision=self._revision.get(), allow_patterns=[], local_files_only=True)
            )
        except Exception as error:  # it is not there, or no name that the hub could have
            raise ModelLoadFailed(
                f"the checkpoint {self._named()} is neither a folder nor in the cache, and the Hugging Face hub cannot "
                f"be reached; connect to the hub, or set {self._setting.name} to a folder"
            ) from error

    def _whole_in_cache(self) -> Path | None:
        """Return the cache's folder, or nothing where there is none or it is known to lack files."""
        try:
            folder = self._cached()
        except ModelLoadFailed:
            return None
        try:
            from huggingface_hub import get_cached_repo_tree

            files = {file.path: file for file in get_cached_repo_tree(self.name, revision=folder.name)}
            wanted = self._wanted(files)
        except Exception:  # an older library, or what it has cached, has no list of the files: loading will tell
            return folder
        return folder if all((folder / name).exists() for name in wanted) else None

    def _named(self) -> str:
        """Say which checkpoint is meant, as it is set."""
        named = f"{self._setting.name}={self.name}"
        if self.is_local or self._revision.get() == self._revision.default:
            return named
        return f"{named} at {self._revision.name}={self._revision.get()}"


@contextmanager
def nothing_loading() -> Iterator[None]:
    """Wait until no checkpoint is being loaded by transformers, and let none be loaded meanwhile.

    For what changes torch in all threads, such as an export: loading would fail, or spoil it. Not to be entered by
    something that is loading.
    """
    with _loads:
        _loads.wait_for(lambda: _n_loads == 0)
        yield


@contextmanager
def _one_more_loading() -> Iterator[None]:
    global _n_loads
    with _loads:
        _n_loads += 1
    try:
        yield
    finally:
        with _loads:
            _n_loads -= 1
            _loads.notify_all()


def _hub_can_be_reached() -> bool:
    """Ask whether the hub answers, once and briefly: its library would try for every file, for half a minute each."""
    from huggingface_hub import constants, get_session

    try:
        _give_requests_a_timeout()
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # no network, a proxy that refuses, offline mode: each has its own class
        logger.info("The Hugging Face hub cannot be reached (%s); only what is cached can be loaded", error)
        return False
    return True


def _give_requests_a_timeout() -> None:
    """Have each request of the hub's library that would wait for ever wait as long as its downloads do for more bytes.

    Most of its functions take no time-out, or say None for it, which the client's own would not change.
    """
    from huggingface_hub import constants, get_session, set_client_factory

    global _client_is_set
    with _client_lock:  # to set it closes the client, which another model may be using by then
        if _client_is_set:
            return
        client = get_session()  # httpx's or httpx2's, as the library's version has it
        kind, hooks = type(client), client.event_hooks  # one of the hooks is the library's offline mode

        def limit(request: Any) -> None:
            timeouts = request.extensions["timeout"]
            limits = {of: constants.HF_HUB_DOWNLOAD_TIMEOUT if s is None else s for of, s in timeouts.items()}
            request.extensions["timeout"] = limits

        hooks = hooks | {"request": [*hooks["request"], limit]}
        set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=None))
        _client_is_set = True


def _hub_is_down(error: BaseException | None) -> bool:
    """Tell whether the hub could not answer for now, rather than that it has no such checkpoint or the disk is full."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # raised from what kept the library from asking the hub
        error = error.__cause__
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):  # also one that is gated
        return False
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    # httpx's or httpx2's, as the library's version has it
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _why_not_had(error: Exception) -> str:
    """Say in words what the hub tells by an HTTP status alone."""
    from huggingface_hub import errors

    for kind, reason in (
        (errors.GatedRepoError, "it is gated; accept its conditions there, and set HF_TOKEN to your token"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.RepositoryNotFoundError, "there is none, or it is not for everybody and wants a token (HF_TOKEN)"),
    ):
        if isinstance(error, kind):
            return reason
    return _first_sentence(error)


def _first_sentence(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:300].rstrip(".")
