"""Logging to LOG_PATH and standard error, safely from several processes.

Every process appends to the file itself; a lock file beside it guards each record and the rotation, so that lines
of different processes never mix and none is lost when the file is rotated. What is logged while a thread works on a
request has the request's id.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from concurrent_log_handler import ConcurrentRotatingFileHandler

from feature_extraction_server.core.errors import SettingError
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.tracking import current

LOGGER_NAME: Final = "feature_extraction_server"
LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
MAX_FILE_BYTES: Final = 10 * 1024 * 1024
KEPT_FILES: Final = 5
FORMATS: Final = ("text", "json")
_TEXT: Final = "%(asctime)s %(levelname)s [%(process)d %(threadName)s] %(name)s: %(request)s%(message)s"


class _TextFormatter(logging.Formatter):
    """A line a record, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        request = current.get()
        record.request = "" if request is None else f"[{request.id}] "
        return super().format(record)


class _JSONFormatter(logging.Formatter):
    """One JSON object a line: the record's parts, the request's id, and the ``fields`` that it was logged with."""

    def format(self, record: logging.LogRecord) -> str:
        request = current.get()
        moment = datetime.fromtimestamp(record.created, UTC)
        told: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "thread": record.threadName,
            "request_id": None if request is None else request.id,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told | getattr(record, "fields", {}), ensure_ascii=False, default=str)


class LogServer:
    """Sets up logging in the server's process and, by ``configure_worker``, in any process that runs a model."""

    def __init__(self, settings: SettingsManager) -> None:
        self._level = settings.add_setting(
            name="LOG_LEVEL", type=str, default="INFO", choices=LEVELS, description="Least severe level that is logged"
        )
        self._path = settings.add_setting(
            name="LOG_PATH", type=str, default="logs/log.txt", description="Where the log file is stored"
        )
        self._format = settings.add_setting(
            name="LOG_FORMAT",
            type=str,
            default="text",
            choices=FORMATS,
            description="Whether the log has lines of text, or one JSON object a line",
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
            handler.setFormatter(_JSONFormatter() if self._format.get() == "json" else _TextFormatter(_TEXT))
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
            handler = ConcurrentRotatingFileHandler(str(path), "a", **options)
            # The handler itself would open both with the first record, and say what is wrong with every one.
            for opened in (path, Path(handler.lockFilename)):
                with opened.open("a"):
                    pass
            return handler
        except OSError as error:
            raise SettingError(
                f"LOG_PATH={str(path)!r} is not allowed: it must be a file that can be written, and so must its folder "
                f"({error.strerror})"
            ) from None
