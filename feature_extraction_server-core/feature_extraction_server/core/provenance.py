"""Where a model's answers come from: which checkpoint, in which precision, on which device.

Vectors are comparable where these are the same. Whatever process loaded the model tells it, once it is loaded.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.resources import device_of
from feature_extraction_server.core.tracking import Origin, RequestRecord

if TYPE_CHECKING:
    from feature_extraction_server.core.application import ApplicationInterface

logger = logging.getLogger(__name__)

KEYS: Final = ("checkpoint", "revision", "dtype", "device")
#: What ``files_of`` tells; no client is told.
FILES: Final = "files"
#: Revisions that do not say which weights they are: the files of a folder may be replaced.
_UNSURE: Final = (None, "local")
_IDENTITY_BYTES: Final = 16


def provenance_of(module: Any) -> dict[str, str | None]:
    """Return ``checkpoint``, ``revision``, ``dtype`` and ``device`` of a loaded model; None where it does not say.

    It says so by its module's function ``provenance`` or by the module's ``checkpoint`` (a ``Checkpoint``).
    """
    tell = getattr(module, "provenance", None) or getattr(getattr(module, "checkpoint", None), "provenance", None)
    try:
        told = tell() if callable(tell) else {}
        provenance = {key: None if told.get(key) is None else str(told[key]) for key in KEYS}
    except Exception:  # a plugin's fault, for which nobody should do without the model
        logger.exception("The model %s cannot tell where its answers come from", getattr(module, "__name__", module))
        provenance = dict.fromkeys(KEYS)
    return provenance | {"device": device_of(module) or provenance["device"]}


def files_of(module: Any) -> str:
    """Return a digest that changes with what a model loads of its checkpoints' local folders."""
    files = []
    for checkpoint in [value for value in vars(module).values() if isinstance(value, Checkpoint)]:
        for path in checkpoint.local_files():
            with suppress(FileNotFoundError):  # it has just gone
                found = path.stat()
                files.append((str(path), found.st_size, found.st_mtime_ns))
    return blake2b(repr(sorted(files)).encode(), digest_size=_IDENTITY_BYTES).hexdigest()


def difference(now: dict[str, str | None], before: dict[str, str | None], keys: Iterable[str]) -> str:
    """Say in which of the keys two provenances differ; nothing where they do not."""
    different = [key for key in keys if now[key] != before[key]]
    return ", ".join(
        "the files have changed" if key == FILES else f"the {key} is {now[key]}, not {before[key]}" for key in different
    )


def origin_of(model: str, provenance: dict[str, str | None]) -> Origin:
    """Return the origin of what a model answers from now on until it is stopped.

    Its identity is that of an earlier life of the model where it is sure that the weights are the same.
    """
    if provenance["revision"] in _UNSURE:
        return Origin(os.urandom(_IDENTITY_BYTES), provenance)
    text = json.dumps([model, provenance], sort_keys=True)
    return Origin(blake2b(text.encode(), digest_size=_IDENTITY_BYTES).digest(), provenance)


def meta_of(application: ApplicationInterface, record: RequestRecord) -> dict[str, Any]:
    """Return what the answer to a request tells of itself: what gave it, where it comes from, and how long it took.

    Args:
        record: of a request that was answered, and whose origin was asked for (``wants_origin``).
    """
    assert record.model is not None
    origin, times = record.answer_origin, record.times
    provenance: dict[str, str | None] = dict.fromkeys(KEYS) if origin is None else origin.provenance
    return {
        "task": record.task,
        "model": record.model,
        **provenance,
        "plugin_version": application.registry.plugin("models", record.model).version,
        "queued_seconds": 0.0 if times is None else round(times.queued_s, 6),
        "computed_seconds": 0.0 if times is None else round(times.computed_s, 6),
    }
