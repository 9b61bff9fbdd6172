"""Settings: named, typed values from the command line, the environment, a ``.env`` file or a default.

The first of these that has a value wins. All values are checked once, by ``SettingsManager.check()``, before the
server binds anything; afterwards ``Setting.get()`` is a plain look-up that any thread may make.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from dotenv import dotenv_values
from dotenv.parser import parse_stream

from feature_extraction_server.core.errors import SettingError

T = TypeVar("T", str, int, float, bool)

_BOOLEANS: Final = {"true": True, "1": True, "yes": True, "on": True}
_BOOLEANS.update({"false": False, "0": False, "no": False, "off": False})
_SECRET_NAME: Final = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
_KINDS: Final = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _parse_bool(text: str) -> bool:
    return _BOOLEANS[text.lower()]


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_PARSERS: Final[dict[type, Callable[[str], Any]]] = {str: str, int: int, float: _parse_float, bool: _parse_bool}


@dataclass(eq=False)
class Setting(Generic[T]):
    """One setting. ``get()`` gives its value, wherever it is needed.

    ``default`` may be None (no value); ``choices`` limits the values; ``minimum`` and ``maximum`` bound a number;
    ``pattern`` is a regular expression that all of a text must match. A ``secret`` value is shown nowhere; a setting
    counts as secret too where its name has TOKEN, KEY, SECRET or PASSWORD in it.
    """

    name: str
    type: type[T]
    default: T | None
    description: str
    choices: Sequence[T] | None = None
    minimum: float | None = None
    maximum: float | None = None
    pattern: str | None = None
    secret: bool = False
    _manager: SettingsManager | None = field(default=None, repr=False)

    def get(self) -> Any:
        """Return the value that is in force (typed as the setting is), or None where there is none.

        Raises:
            SettingError: the value that was given is not allowed.
        """
        assert self._manager is not None
        return self._manager._value(self)

    @property
    def given(self) -> str | None:
        """The text that was given, which ``get()`` has the value of; None where the default is in force."""
        assert self._manager is not None
        return self._manager._given(self.name)

    def parse(self, text: str) -> T:
        """Turn a given text into the setting's value.

        Raises:
            SettingError: naming the setting, the text and what is allowed.
        """
        try:
            value: T = _PARSERS[self.type](text.strip())
        except (ValueError, KeyError):
            raise self._not_allowed(text) from None
        if self.choices is not None and value not in self.choices:
            raise self._not_allowed(text)
        if not isinstance(value, str):
            too_small = self.minimum is not None and value < self.minimum
            if too_small or (self.maximum is not None and value > self.maximum):
                raise self._not_allowed(text)
        if self.pattern is not None and not re.fullmatch(self.pattern, text.strip()):
            raise self._not_allowed(text)
        return value

    @property
    def is_secret(self) -> bool:
        """Whether the value must not be shown."""
        return self.secret or _SECRET_NAME.search(self.name) is not None

    def _not_allowed(self, text: str) -> SettingError:
        given = f"{self.name} has a value that" if self.is_secret else f"{self.name}={text!r}"
        return SettingError(f"{given} is not allowed: it must be {self.allowed()}")

    def allowed(self) -> str:
        """Say in words which values are allowed."""
        if self.choices is not None:
            return "one of " + ", ".join(map(str, self.choices)) if self.choices else "unset (nothing to choose from)"
        if self.minimum is not None and self.maximum is not None:
            return f"{_KINDS[self.type]} from {self.minimum:.15g} to {self.maximum:.15g}"
        if self.minimum is not None:
            return f"{_KINDS[self.type]} of at least {self.minimum:.15g}"
        if self.maximum is not None:
            return f"{_KINDS[self.type]} of at most {self.maximum:.15g}"
        if self.pattern is not None:
            return f"of the form {self.pattern}"
        return _KINDS[self.type]

    def same_definition(self, other: Setting[Any]) -> bool:
        """Tell whether two plugins declare the same setting in the same way."""
        definitions = [
            (setting.type, setting.default, setting.choices, setting.minimum, setting.maximum, setting.pattern)
            for setting in (self, other)
        ]
        return definitions[0] == definitions[1]


class SettingsManager:
    """All settings of a server and where their values come from.

    Args:
        environment: the environment's variables; an empty value counts as unset.
        dotenv_path: the ``.env`` file (need not exist); by default that of the working directory.
        command_line: values given as command line options, by setting name.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        dotenv_path: Path | None = None,
        command_line: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = os.environ if environment is None else environment
        # The working directory is named here: dotenv's own search would start beside the installed module.
        self._dotenv_path = Path.cwd() / ".env" if dotenv_path is None else dotenv_path
        self._command_line = dict(command_line or {})
        self._settings: dict[str, Setting[Any]] = {}
        self._declared: list[Setting[Any]] = []
        self._values: dict[str, Any] = {}
        self._checks: list[Callable[[], object]] = []

    def add_setting(
        self,
        *,
        name: str,
        type: type[T],
        default: T | None,
        description: str,
        choices: Sequence[T] | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
        pattern: str | None = None,
        secret: bool = False,
    ) -> Setting[T]:
        """Declare a setting and return it. Declaring the same one again returns the first.

        Raises:
            ValueError: another plugin declared a different setting of that name, or ``type`` is not supported.
            re.error: ``pattern`` is no regular expression.
        """
        if type not in _PARSERS:
            raise ValueError(f"setting {name}: type must be str, int, float or bool")
        if name != name.upper() or not name.isidentifier() or name == "HELP":  # it is a command line option, too
            raise ValueError(f"setting {name}: a setting's name is upper case, of letters, digits and _; not HELP")
        if pattern is not None:
            re.compile(pattern)
        setting = Setting(name, type, default, description, choices, minimum, maximum, pattern, secret, self)
        known = self._settings.setdefault(name, setting)
        if not known.same_definition(setting):
            raise ValueError(f"setting {name} is already declared differently")
        self._declared.append(known)
        return known

    def declared_by(self, add_settings: Callable[[SettingsManager], Any]) -> tuple[Setting[Any], ...]:
        """Let a plugin's ``add_settings`` declare its settings, and return them."""
        self._declared = []
        add_settings(self)
        return tuple(dict.fromkeys(self._declared))

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Take back all settings and checks that the block adds if it raises."""
        settings, checks = dict(self._settings), list(self._checks)
        try:
            yield
        except BaseException:
            self._settings, self._checks = settings, checks
            self._values.clear()  # of a name that may come again with another type
            raise

    def all(self) -> list[Setting[Any]]:
        """Return all declared settings, sorted by name."""
        return [self._settings[name] for name in sorted(self._settings)]

    def add_check(self, check: Callable[[], object]) -> None:
        """Have ``check`` look closer at values than parsing does; it raises SettingError for a wrong one."""
        self._checks.append(check)

    def check(self) -> None:
        """Parse every setting.

        Raises:
            SettingError: the first value that is not allowed.
        """
        for setting in self.all():
            setting.get()
        for check in self._checks:
            check()

    def read_command_line(self, arguments: Sequence[str], description: str) -> dict[str, str]:
        """Take options such as ``--log-level DEBUG``; ``--help`` lists all settings. Exits with 2 on a bad option.

        Returns:
            What was given, by the settings' names.
        """
        parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
        for setting in self.all():
            default = "none" if setting.default is None else setting.default
            text = f"{setting.description} ({setting.allowed()}; default: {default})"
            option = "--" + setting.name.lower().replace("_", "-")
            parser.add_argument(option, dest=setting.name, metavar="VALUE", help=text.replace("%", "%%"))
        options = vars(parser.parse_args(arguments))
        given = {name: value for name, value in options.items() if value is not None}
        self._command_line.update(given)
        self._values.clear()
        return given

    @cached_property
    def _dotenv(self) -> Mapping[str, str | None]:
        # Asked for here, since dotenv takes whatever it cannot open for an empty file.
        if not self._dotenv_path.is_file():
            return {}
        try:
            with self._dotenv_path.open(encoding="utf-8") as file:
                wrong = next((binding for binding in parse_stream(file) if binding.error), None)
            if wrong is None:
                return dotenv_values(self._dotenv_path, interpolate=False)
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"{self._dotenv_path} cannot be read: it must be a UTF-8 text file ({error})") from None
        # dotenv would leave it out with a warning: a server could run without its API_KEYS. It may be a secret.
        text = wrong.original.string
        line = wrong.original.line + text[: len(text) - len(text.lstrip())].count("\n")
        raise SettingError(f"{self._dotenv_path} cannot be read: line {line} is not of the form NAME=value")

    def _value(self, setting: Setting[Any]) -> Any:
        if setting.name not in self._values:
            text = self._given(setting.name)
            self._values[setting.name] = setting.default if text is None else setting.parse(text)
        return self._values[setting.name]

    def _given(self, name: str) -> str | None:
        for source in (self._command_line, self._environment, self._dotenv):
            text = source.get(name)
            if text is not None and text.strip():
                return text
        return None
