"""Settings: where values come from, which are allowed, and what a wrong one leads to."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dev_server import ROOT
from feature_extraction_server.core.errors import SettingError
from feature_extraction_server.core.logs import LogServer
from feature_extraction_server.core.settings import Setting, SettingsManager
from tests.conftest import free_port, server_environment


@pytest.fixture
def manager(tmp_path: Path) -> Callable[..., SettingsManager]:
    """``manager(env, dotenv, command_line)`` gives settings with these values; ``.env`` is written from a text."""

    def make(
        environment: dict[str, str] | None = None, dotenv: str | bytes | None = None, arguments: list[str] | None = None
    ) -> SettingsManager:
        path = tmp_path / ".env"
        if dotenv is not None:
            path.write_bytes(dotenv if isinstance(dotenv, bytes) else dotenv.encode())
        settings = SettingsManager(environment or {}, path)
        settings.add_setting(name="COLOUR", type=str, default="grey", description="A colour, in 100 % of cases")
        if arguments is not None:
            settings.read_command_line(arguments, "A test")
        return settings

    return make


def add(settings: SettingsManager, **definition: Any) -> Setting[Any]:
    complete: dict[str, Any] = {"name": "COLOUR", "type": str, "default": "grey", "description": ""}
    return settings.add_setting(**(complete | definition))


def colour(settings: SettingsManager) -> Any:
    return add(settings, description="").get()


# Precedence


@pytest.mark.parametrize(
    ("environment", "dotenv", "arguments", "expected"),
    [
        pytest.param({"COLOUR": "red"}, "COLOUR=green", ["--colour", "blue"], "blue", id="command line first"),
        pytest.param({"COLOUR": "red"}, "COLOUR=green", [], "red", id="then the environment"),
        pytest.param({}, "COLOUR=green", [], "green", id="then .env"),
        pytest.param({}, None, [], "grey", id="then the default"),
        pytest.param({"COLOUR": ""}, "COLOUR=green", None, "green", id="an empty variable is unset"),
        pytest.param({"COLOUR": "  "}, "COLOUR=green", None, "green", id="a blank variable is unset"),
        pytest.param({"COLOUR": "red"}, None, ["--colour", ""], "red", id="an empty option is unset"),
        pytest.param({}, "COLOUR=", None, "grey", id="an empty line of .env is unset"),
        pytest.param({}, "COLOUR", None, "grey", id="a line of .env without a value is unset"),
        pytest.param({}, "# a comment\nexport COLOUR='light blue'  # so\n", None, "light blue", id="quotes in .env"),
        pytest.param({}, "COLOUR=${HOME}", None, "${HOME}", id=".env is not expanded"),
        pytest.param({}, None, ["--colour=--red"], "--red", id="a value like an option"),
    ],
)
def test_first_source_that_has_a_value_wins(
    manager: Callable[..., SettingsManager],
    environment: dict[str, str],
    dotenv: str | None,
    arguments: list[str] | None,
    expected: str,
) -> None:
    assert colour(manager(environment, dotenv, arguments)) == expected


def test_dotenv_is_read_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("COLOUR=green")
    monkeypatch.chdir(tmp_path)

    assert colour(SettingsManager({})) == "green"


def test_dotenv_that_is_no_text_is_an_error_with_its_path(manager: Callable[..., SettingsManager]) -> None:
    settings = manager({}, b"COLOUR=\xff\xfe")

    with pytest.raises(SettingError, match=r"\.env cannot be read"):
        settings.check()


def test_line_of_dotenv_that_cannot_be_read_is_an_error_that_keeps_it_secret(
    manager: Callable[..., SettingsManager],
) -> None:
    settings = manager({}, "A=1\n\nAPI_KEYS='o'neil-0123456789'\nCOLOUR=red\n")

    with pytest.raises(SettingError, match=r"\.env cannot be read: line 3 is not of the form NAME=value") as caught:
        settings.check()
    assert "neil" not in str(caught.value)


def test_log_of_which_the_lock_beside_it_cannot_be_written_is_refused(
    tmp_path: Path, manager: Callable[..., SettingsManager]
) -> None:
    (tmp_path / ".__log.txt.lock").mkdir()
    log_server = LogServer(manager({"LOG_PATH": str(tmp_path / "log.txt")}))

    with pytest.raises(SettingError, match=r"LOG_PATH=.* is not allowed"):
        log_server.configure()


def test_dotenv_that_is_a_folder_counts_as_missing(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()

    assert colour(SettingsManager({}, tmp_path / ".env")) == "grey"


# Values


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (str, " red ", "red"),
        (int, "12", 12),
        (int, "-3", -3),
        (float, "1.5", 1.5),
        (float, "2", 2.0),
        (float, "1e3", 1000.0),
        (bool, "true", True),
        (bool, "YES", True),
        (bool, "1", True),
        (bool, "on", True),
        (bool, "False", False),
        (bool, "no", False),
        (bool, "0", False),
        (bool, "off", False),
    ],
)
def test_text_becomes_a_value_of_the_settings_type(kind: Any, text: str, expected: Any) -> None:
    value = add(SettingsManager({"X": text}), name="X", type=kind, default=None).get()

    assert value == expected
    assert type(value) is kind


@pytest.mark.parametrize(
    ("definition", "text", "allowed"),
    [
        pytest.param({"type": int}, "1.5", "a whole number", id="a fraction"),
        pytest.param({"type": int}, "many", "a whole number", id="a word for a whole number"),
        pytest.param({"type": float}, "much", "a number", id="a word for a number"),
        pytest.param({"type": float}, "nan", "a number", id="NaN"),
        pytest.param({"type": float}, "inf", "a number", id="infinity"),
        pytest.param({"type": bool}, "maybe", "true or false", id="a word for true"),
        pytest.param({"type": bool}, "2", "true or false", id="two for true"),
        pytest.param({"type": int, "minimum": 1}, "0", "a whole number of at least 1", id="too small"),
        pytest.param({"type": float, "minimum": 0}, "-0.1", "a number of at least 0", id="negative"),
        pytest.param({"type": int, "maximum": 9}, "10", "a whole number of at most 9", id="too large"),
        pytest.param({"type": int, "minimum": 0, "maximum": 65535}, "65536", "from 0 to 65535", id="out of range"),
        pytest.param({"type": str, "choices": ["red", "blue"]}, "green", "one of red, blue", id="not a choice"),
        pytest.param({"type": str, "choices": ["red"]}, "RED", "one of red", id="a choice in capitals"),
        pytest.param({"type": str, "choices": []}, "red", "nothing to choose from", id="no choice at all"),
        pytest.param({"type": str, "pattern": "a|cuda(:[0-9]+)?"}, "cuda:x", "cuda(:[0-9]+)?", id="another form"),
    ],
)
def test_wrong_value_is_told_with_the_setting_and_what_is_allowed(
    definition: dict[str, Any], text: str, allowed: str
) -> None:
    settings = SettingsManager({"SIZE": text})
    add(settings, name="SIZE", default=None, **definition)

    with pytest.raises(SettingError) as caught:
        settings.check()

    message = str(caught.value)
    assert message.startswith(f"SIZE={text!r} is not allowed: it must be ")
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["0", "65535"])
def test_bounds_themselves_are_allowed(text: str) -> None:
    settings = SettingsManager({"SIZE": text})

    assert add(settings, name="SIZE", type=int, default=1, minimum=0, maximum=65535).get() == int(text)


def test_value_that_nobody_declared_is_ignored() -> None:
    settings = SettingsManager({"SIZE": "x"})

    settings.check()

    assert settings.all() == []


# Declarations


def test_setting_declared_twice_alike_is_one() -> None:
    settings = SettingsManager({})

    assert add(settings) is add(settings)
    assert len(settings.all()) == 1


@pytest.mark.parametrize(
    "difference",
    [{"default": "red"}, {"type": int, "default": 1}, {"choices": ["grey"]}, {"pattern": "g.*"}],
    ids=["default", "type", "choices", "pattern"],
)
def test_setting_declared_twice_differently_is_refused(difference: dict[str, Any]) -> None:
    settings = SettingsManager({})
    add(settings)

    with pytest.raises(ValueError, match="COLOUR is already declared differently"):
        add(settings, **difference)


@pytest.mark.parametrize(
    ("definition", "message"),
    [({"type": list}, "type must be"), ({"name": "colour"}, "upper case")],
    ids=["a list", "lower case"],
)
def test_declaration_that_is_wrong_is_refused(definition: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add(SettingsManager({}), **definition)


# The command line


@pytest.mark.parametrize(
    "arguments",
    [["--color", "red"], ["--col", "red"], ["red"], ["--colour"]],
    ids=["unknown option", "abbreviation", "no option", "no value"],
)
def test_wrong_command_line_exits_with_status_2(
    manager: Callable[..., SettingsManager], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        manager(arguments=arguments)

    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_shows_description_and_default(
    manager: Callable[..., SettingsManager], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        manager(arguments=["--help"])

    help = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--colour VALUE" in help
    assert "A colour, in 100 % of cases" in help
    assert "default: grey" in help


# Real processes


def run_dev_server(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "dev_server.py"), "--host", "127.0.0.1", "--port", str(free_port()), *arguments],
        cwd=folder,
        env=server_environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        pytest.param([], {"REQUEST_TIMEOUT": "never"}, "REQUEST_TIMEOUT='never' is not allowed", id="environment"),
        pytest.param(["--max-queue-size", "0"], {}, "MAX_QUEUE_SIZE='0' is not allowed", id="option"),
        pytest.param(["--port", "70000"], {}, "PORT='70000' is not allowed", id="port"),
        pytest.param([], {"DEFAULT_TASK": "juggling"}, "DEFAULT_TASK='juggling' is not allowed", id="task"),
        pytest.param([], {"PRELOAD_MODELS": "fake_echo, he"}, "there is no model 'he'", id="model to preload"),
        pytest.param([], {"ALLOWED_URL_HOSTS": "a.org, https://b.org"}, "'https://b.org' is no host name", id="hosts"),
        pytest.param([], {"LOG_PATH": "/dev/null/log.txt"}, "LOG_PATH='/dev/null/log.txt'", id="log"),
        pytest.param([], {"LOG_LEVEL": "LOUD"}, "one of DEBUG, INFO, WARNING", id="level"),
        pytest.param([], {"FAKE_SECONDS": "long"}, "FAKE_SECONDS='long' is not allowed", id="a plugin's"),
    ],
)
def test_wrong_setting_ends_the_dev_server_with_one_line(
    tmp_path: Path, arguments: list[str], settings: dict[str, str], message: str
) -> None:
    result = run_dev_server(tmp_path, *arguments, **settings)

    assert result.returncode == 2
    assert result.stderr.startswith("feature_extraction_server: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.process
def test_unknown_option_ends_the_dev_server(tmp_path: Path) -> None:
    result = run_dev_server(tmp_path, "--colour", "red")

    assert result.returncode == 2
    assert "unrecognized arguments: --colour red" in result.stderr


@pytest.mark.process
def test_help_of_the_dev_server_lists_all_settings(tmp_path: Path) -> None:
    result = run_dev_server(tmp_path, "--help")

    names = ["host", "port", "log-level", "log-path", "default-task", "default-model-image-captioning", "max-items"]
    names += ["default-consumer-type", "request-timeout", "max-content-length", "result-check-interval"]
    names += ["max-queue-size", "max-batch-size", "stop-grace-period", "load-retry-delay", "max-image-pixels"]
    names += ["max-audio-seconds", "preload-models", "fake-seconds"]
    assert result.returncode == 0
    assert [name for name in names if f"--{name} VALUE" not in result.stdout] == []


@pytest.mark.process
def test_port_that_is_taken_ends_the_dev_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        result = run_dev_server(tmp_path, "--port", str(port))

    assert result.returncode == 1
    assert f"Port {port} is in use" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("name", "secret"), [("HF_TOKEN", False), ("API_KEYS", False), ("PIN", True)])
def test_value_of_a_secret_is_not_told_where_it_is_not_allowed(
    manager: Callable[..., SettingsManager], name: str, secret: bool
) -> None:
    settings = manager({name: "s3same"})
    settings.add_setting(name=name, type=int, default=None, description="A secret", secret=secret)

    with pytest.raises(SettingError, match=f"{name} has a value that is not allowed") as caught:
        settings.check()

    assert "s3same" not in str(caught.value)


def test_settings_that_a_plugin_declares_are_told_even_where_another_declared_them_first(
    manager: Callable[..., SettingsManager],
) -> None:
    settings = manager({})

    def declare(settings: SettingsManager) -> None:
        for name in ("SIZE", "COUNT", "SIZE"):
            settings.add_setting(name=name, type=int, default=1, description="One of two")

    first, second = settings.declared_by(declare), settings.declared_by(declare)

    assert [setting.name for setting in first] == ["SIZE", "COUNT"]
    assert second == first
