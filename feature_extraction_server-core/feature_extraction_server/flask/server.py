"""Putting a server together, in the order that everything depends on: settings, plugins, logging, engine."""

from __future__ import annotations

import sys
from collections.abc import Callable

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import SettingError
from feature_extraction_server.core.logs import LogServer
from feature_extraction_server.core.plugins import discover
from feature_extraction_server.core.server_settings import ServerSettings
from feature_extraction_server.core.settings import SettingsManager


def build_engine(settings: SettingsManager, configure: Callable[[SettingsManager], None] | None = None) -> Engine:
    """Discover the plugins and make the engine over them.

    Args:
        configure: called when all settings are declared, before any is read (the dev server's command line).

    Exits with status 2 and one line on standard error where a setting's value is not allowed.
    """
    log_server = LogServer(settings)
    registry = discover(settings)
    server_settings = ServerSettings(settings, registry)
    if configure is not None:
        configure(settings)
    try:
        settings.check()
        server_settings.preload_models()
        log_server.configure()
    except SettingError as error:
        sys.stderr.write(f"feature_extraction_server: {error}\n")
        raise SystemExit(2) from None
    registry.log_failures()
    return Engine(registry, server_settings, log_server)
