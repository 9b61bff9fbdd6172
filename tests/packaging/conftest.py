"""Fixtures: wheels of all distributions, and virtual environments to install into, without any download."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from dev_server import SOURCES
from tests.conftest import CLIENT, Server, free_port

CORE, PLUGINS = SOURCES[0], SOURCES[1:]
DISTRIBUTIONS = [*SOURCES, CLIENT]

# Prints what is discovered, and from where. Fails where a plugin is left out.
_DISCOVER = """
import json
from feature_extraction_server.core.plugins import discover
from feature_extraction_server.core.settings import SettingsManager
plugins = discover(SettingsManager({})).plugins
assert not (errors := [p for p in plugins if p.error]), errors
print(json.dumps({f"{p.kind}.{p.name}": p.module.__file__ for p in plugins}))
"""

# Builds what ``pip wheel`` would, which starts a process for each.
_BUILD = """
import os, sys
from flit_core.buildapi import build_wheel
for folder in sys.argv[2:]:
    os.chdir(folder)
    build_wheel(sys.argv[1])
"""


def plugin_name(folder: Path) -> str:
    """Return ``<kind>.<name>`` of a plugin's folder."""
    name = folder.name.removeprefix("feature_extraction_server-").replace("-", ".", 1)
    return f"{name}_consumer" if name.startswith("consumers.") else name


BUILT_IN_CONSUMERS = {
    f"consumers.{file.stem}" for file in (CORE / "feature_extraction_server" / "consumers").glob("[!_]*.py")
}


class Environment:
    """A virtual environment of its own that also sees the packages of the running one, the dependencies that is.

    pip finds no index from within.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, symlinks=True)
        self.bin = folder / "bin"
        self.python = str(self.bin / "python")
        self.site_packages = Path(self.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
        (self.site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        for name in ("flit", "gunicorn"):
            self._add_script(name)

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a command to its end and return what it printed. It fails the test where it fails."""
        done = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.variables(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}"
        return done.stdout.strip()

    def install(self, *arguments: str | Path, look_for_dependencies: bool = False) -> None:
        """Install with pip.

        Args:
            look_for_dependencies: whether one that the running environment lacks is an error. To look takes seconds.
        """
        no_deps = "0" if look_for_dependencies else "1"
        self.run("python", "-m", "pip", "install", *map(str, arguments), PIP_NO_DEPS=no_deps)

    def discover(self, path: Sequence[Path] = ()) -> dict[str, Path]:
        """Return the modules of all plugins found from within, by ``<kind>.<name>``, but the built-in consumers.

        Args:
            path: folders to put on PYTHONPATH.
        """
        found = json.loads(self.run("python", "-c", _DISCOVER, PYTHONPATH=os.pathsep.join(map(str, path))))
        return {name: Path(file) for name, file in found.items() if name not in BUILT_IN_CONSUMERS}

    def variables(self, **settings: str) -> dict[str, str]:
        """Return the variables of a shell in which the environment is activated."""
        inherited = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        own = {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's word for "true" here: flit_core is the running environment's
            "PIP_NO_DEPS": "1",
            "PIP_NO_INDEX": "1",
            "FLIT_ROOT_INSTALL": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return inherited | own | settings

    def _add_script(self, name: str) -> None:
        (entry,) = entry_points(group="console_scripts", name=name)
        script = self.bin / name
        script.write_text(f"#!{self.python}\nimport sys\nfrom {entry.module} import {entry.attr}\n{entry.attr}()\n")
        script.chmod(0o755)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of all distributions, by the name of their folder."""
    target = tmp_path_factory.mktemp("wheels")
    subprocess.run([sys.executable, "-c", _BUILD, str(target), *map(str, DISTRIBUTIONS)], check=True, timeout=240)
    files = {file.name.split("-")[0]: file for file in target.iterdir()}
    return {source.name: files[source.name.replace("-", "_")] for source in DISTRIBUTIONS}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``serve(environment, command, cwd, SETTING=value, ...)`` starts a server by a shell command.

    ``:5000`` in the command is replaced by a free port of this machine alone.
    """
    servers: list[Server] = []

    def start(environment: Environment, command: str, cwd: Path, **settings: str) -> Server:
        port = free_port()
        assert ":5000" in command
        local = command.replace(":5000", f"127.0.0.1:{port}")
        variables = environment.variables(LOG_PATH=str(tmp_path / "log.txt"), **settings)
        shell = ["sh", "-c", f'cd "{cwd}" && exec {local}']
        servers.append(Server(shell, port, tmp_path, variables))
        return servers[-1].wait_until_ready()

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()
