"""The development server: one process, settings on the command line too."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from werkzeug.serving import make_server

from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from feature_extraction_server.flask.app import create_app


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then stop the models and return."""
    settings = SettingsManager()
    host = settings.add_setting(
        name="HOST", type=str, default="localhost", description="The host of the development server"
    )
    port = settings.add_setting(
        name="PORT",
        type=int,
        default=5000,
        minimum=0,
        maximum=65535,
        description="The port of the development server; 0 takes a free one",
    )
    given = sys.argv[1:] if arguments is None else arguments

    def configure(settings: SettingsManager) -> None:
        # The processes that this one starts know no command line.
        os.environ.update(settings.read_command_line(given, "Feature Extraction Server"))

    engine = build_engine(settings, configure=configure)
    app = create_app(engine)
    try:
        server = make_server(host.get(), port.get(), app, threaded=True)
    except OSError as error:
        sys.stderr.write(f"feature_extraction_server: cannot listen on {host.get()}:{port.get()}: {error.strerror}\n")
        raise SystemExit(1) from None
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        engine.preload()
        server.service_actions = engine.retry_preloaded  # type: ignore[method-assign]  # called twice a second
        sys.stderr.write(f"Listening on http://{host.get()}:{server.server_port} (development server)\n")
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        engine.close()


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
