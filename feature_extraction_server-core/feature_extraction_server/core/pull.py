"""Download models' checkpoints into the Hugging Face hub's cache, so that the server needs no network afterwards.

    python -m feature_extraction_server.core.pull blip whisper
    python -m feature_extraction_server.core.pull --all

The settings decide what is downloaded ({MODEL}_CHECKPOINT, {MODEL}_REVISION), HF_HOME where to. Nothing is loaded. The
exit status is 1 where a checkpoint could not be had, which is told in a sentence; the others are downloaded all the
same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from feature_extraction_server.core import subprocesses
from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.errors import ModelLoadFailed, SettingError
from feature_extraction_server.core.plugins import discover
from feature_extraction_server.core.settings import SettingsManager


def main(arguments: Sequence[str] | None = None) -> int:
    """Download what the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m feature_extraction_server.core.pull",
        description="Download models' checkpoints into the cache, so that HF_HUB_OFFLINE=1 can be set afterwards.",
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help="a model plugin's name")
    parser.add_argument("--all", action="store_true", help="download the checkpoints of all models")
    given = parser.parse_args(arguments)
    if given.all == bool(given.models):
        parser.error("name the models, or give --all")
    settings = SettingsManager()
    registry = discover(settings, subprocesses.KINDS)
    names = registry.names("models")
    unknown = [model for model in given.models if model not in names]
    if unknown:
        parser.error(f"there is no model {unknown[0]}; there are {', '.join(names) or 'none'}")
    try:
        settings.check()
    except SettingError as error:
        parser.error(str(error))
    if not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    status = 0
    for model in names if given.all else given.models:
        try:
            if (reason := registry.errors.get(("models", model))) is not None:
                raise ModelLoadFailed(f"its plugin is left out: {reason}")
            for line in _pull(registry.models[model]):
                sys.stdout.write(f"{model}: {line}\n")
        except ModelLoadFailed as error:
            sys.stderr.write(f"{model}: {error.message}\n")
            status = 1
    return status


def _pull(module: ModuleType) -> Iterator[str]:
    """Download a model's checkpoints, and say of each what has come of it."""
    checkpoints = [value for value in vars(module).values() if isinstance(value, Checkpoint)]
    if not checkpoints:
        yield "nothing to download"
    for checkpoint in checkpoints:
        if checkpoint.is_local:
            yield f"nothing to download: {checkpoint.download()} is a local folder"
        else:
            folder = checkpoint.pull()
            yield f"{checkpoint.name}, commit {folder.name}: {_n_bytes(folder) / 1e6:,.1f} MB in {folder}"


def _n_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
