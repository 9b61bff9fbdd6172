"""Putting a server together, in the order that everything depends on: settings, plugins, their check, logging.

The core declares its settings first, so that a plugin whose settings clash with them fails, and not the server.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import SettingError
from feature_extraction_server.core.logs import LogServer
from feature_extraction_server.core.memory import keep_freed_memory
from feature_extraction_server.core.plugins import KINDS, Registry, discover
from feature_extraction_server.core.server_settings import ServerSettings
from feature_extraction_server.core.settings import SettingsManager


def set_up(
    settings: SettingsManager,
    *,
    kinds: Sequence[str] = KINDS,
    configure: Callable[[SettingsManager], None] | None = None,
) -> tuple[Registry, ServerSettings, LogServer]:
    """Discover the plugins, check all settings and start logging.

    Args:
        kinds: which kinds of plugins this process needs.
        configure: called when all settings are declared, before any is read (the dev server's command line).

    Exits with status 2 and one line on standard error where a setting's value is not allowed.
    """
    keep_freed_memory()
    log_server = LogServer(settings)
    server_settings = ServerSettings(settings)
    registry = discover(settings, kinds, server_settings.add_settings_of_plugin)
    server_settings.allow_plugins(registry)
    if configure is not None:
        configure(settings)
    try:
        settings.check()
        server_settings.preload_models()
        server_settings.limits()
        server_settings.api_keys()
        server_settings.cors_origins()
        log_server.configure()
    except SettingError as error:
        sys.stderr.write(f"feature_extraction_server: {error}\n")
        raise SystemExit(2) from None
    registry.log_failures()
    return registry, server_settings, log_server


def build_engine(
    settings: SettingsManager,
    *,
    kinds: Sequence[str] = KINDS,
    configure: Callable[[SettingsManager], None] | None = None,
) -> Engine:
    """Set up as ``set_up`` does and make an engine in this process."""
    return Engine(*set_up(settings, kinds=kinds, configure=configure))
