"""Logging to LOG_PATH and standard error, safely from several processes.

Every process appends to the file itself; a lock file beside it guards each record and the rotation, so that lines
of different processes never mix and none is lost when the file is rotated.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

from concurrent_log_handler import ConcurrentRotatingFileHandler

from feature_extraction_server.core.errors import SettingError
from feature_extraction_server.core.settings import SettingsManager

LOGGER_NAME: Final = "feature_extraction_server"
LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
MAX_FILE_BYTES: Final = 10 * 1024 * 1024
KEPT_FILES: Final = 5
_FORMAT: Final = "%(asctime)s %(levelname)s [%(process)d %(threadName)s] %(name)s: %(message)s"


class LogServer:
    """Sets up logging in the server's process and, by ``configure_worker``, in any process that runs a model."""

    def __init__(self, settings: SettingsManager) -> None:
        self._level = settings.add_setting(
            name="LOG_LEVEL", type=str, default="INFO", choices=LEVELS, description="Least severe level that is logged"
        )
        self._path = settings.add_setting(
            name="LOG_PATH", type=str, default="logs/log.txt", description="Where the log file is stored"
        )

    def configure(self) -> None:
        """Send this process's records to LOG_PATH and standard error. Calling it again replaces the set-up.

        Raises:
            SettingError: LOG_PATH cannot be written.
        """
        logger = logging.getLogger(LOGGER_NAME)
        handlers: list[logging.Handler] = [logging.StreamHandler(), self._file_handler()]
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
        for handler in handlers:
            handler.setFormatter(logging.Formatter(_FORMAT))
            logger.addHandler(handler)
        logger.setLevel(self._level.get())
        logger.propagate = False

    def configure_worker(self) -> None:
        """Set up logging where a model's jobs run. A thread of a configured process has it already."""
        if not logging.getLogger(LOGGER_NAME).handlers:
            self.configure()

    def close(self) -> None:
        """Take this process's handlers away again."""
        logger = logging.getLogger(LOGGER_NAME)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()

    def _file_handler(self) -> logging.Handler:
        path = Path(self._path.get())
        options: dict[str, Any] = {"maxBytes": MAX_FILE_BYTES, "backupCount": KEPT_FILES, "encoding": "utf-8"}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a"):
                pass
            return ConcurrentRotatingFileHandler(str(path), "a", **options)
        except OSError as error:
            raise SettingError(
                f"LOG_PATH={str(path)!r} is not allowed: it must be a file that can be written ({error.strerror})"
            ) from None
