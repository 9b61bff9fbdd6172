"""The WSGI entry point for gunicorn and its like."""

from __future__ import annotations

import atexit
import os
import resource
import sys
from functools import partial
from traceback import walk_stack
from typing import Final

from flask import Flask

from feature_extraction_server.core.cores import keep_to_one_core
from feature_extraction_server.core.engine_client import EngineClient
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import set_up
from feature_extraction_server.flask.app import create_app

#: The exit status of a worker at which gunicorn gives up (``Arbiter.APP_LOAD_ERROR``).
GUNICORN_APP_LOAD_ERROR: Final = 4
#: A client takes two of a web worker's file descriptors: its own connection, and one to the engine.
MAX_OPEN_FILES: Final = 65536


def entrypoint() -> Flask:
    """Return the WSGI app. Settings come from the environment and ``.env``.

    The models live in an engine process, one for all workers of a gunicorn, with and without ``--preload``. No
    thread is started here, since it would not outlive the fork of the workers.
    """
    in_worker = _called_by_gunicorn_worker()
    try:
        registry, settings, _ = set_up(SettingsManager())
    except SystemExit as error:
        # gunicorn starts a worker that ends with another status again, for ever.
        raise SystemExit(GUNICORN_APP_LOAD_ERROR if in_worker else error.code) from None
    _allow_many_connections()
    engine = EngineClient(registry, settings, owner_pid=os.getppid() if in_worker else os.getpid())
    engine.in_each_worker(partial(keep_to_one_core, engine.shared_directory, engine.owner_pid))
    atexit.register(engine.close)
    engine.preload()
    return create_app(engine)


def _allow_many_connections() -> None:
    """Raise the number of files that this process may have open: gunicorn's own workers die of too many.

    The usual 1024 are meant for programs that use ``select``. Processes started later inherit the number.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _called_by_gunicorn_worker() -> bool:
    """Tell whether a worker loads the app for itself (no ``--preload``), so that the master is its parent."""
    frames = walk_stack(sys._getframe())
    return any(frame.f_globals.get("__name__", "").startswith("gunicorn.workers") for frame, _ in frames)
