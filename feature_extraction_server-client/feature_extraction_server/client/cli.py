"""The command ``fes``. What it prints goes to standard output, errors and progress to standard error.

Exit status:
    0    everything succeeded
    1    at least one request failed, or a file cannot be read or written
    2    the command line is wrong
    3    no server can be reached
    A Ctrl-C and a closed pipe end it by the signal, as a shell expects (130 and 141).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from feature_extraction_server.client.arguments import (
    batch_options,
    common_options,
    config_object,
    read_task_arguments,
    string_list,
)
from feature_extraction_server.client.batch import run_batch
from feature_extraction_server.client.client import Client
from feature_extraction_server.client.errors import FesError, ServerError, Unreachable
from feature_extraction_server.client.items import Item, UsageError, Value, combine, expand_files, read_text
from feature_extraction_server.client.media import read_files
from feature_extraction_server.client.scaffold import KINDS, new_plugin
from feature_extraction_server.client.show import printable, table

EPILOG = """\
Exit status: 0 if everything succeeded, 1 if a request failed or a file cannot be read or written, 2 for a wrong
command line, 3 if no server can be reached. A FILE is a path, a pattern such as '*.jpg', a folder (all of its
pictures or recordings), or - for standard input. In a pipe, or with --json, each result is one line of JSON; but
new-plugin prints a path unless --json is given.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the command ends
    for stream in (sys.stdout, sys.stderr):
        # A file's name need not be text, nor what a model makes; what cannot be shown is spelled out.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    status: int | str | None
    try:
        try:
            status = run(sys.argv[1:] if arguments is None else arguments)
        except SystemExit as end:  # how argparse ends it, the help written or the command line found wrong
            status = end.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        _die_of("SIGINT", 130)
    except BrokenPipeError:
        _die_of("SIGPIPE", 141)
    except OSError as error:
        status = _fail(1, f"standard input or output: {error.strerror or error}")
        # What could not be written would be tried again by the interpreter as it ends.
        with suppress(OSError):  # it may be no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is run_task:  # --url and its like may also come after the task's name
        _, options.rest = common_options(defaults=False).parse_known_args(options.rest, options)
    if options.json is None:  # a new plugin's path is for the shell, which reads it from a pipe
        options.json = options.command is not write_plugin and not sys.stdout.isatty()
    try:
        with _client(options) as client:
            return int(options.command(client, options))
    except UsageError as error:
        return _fail(2, str(error))
    except Unreachable as error:
        return _fail(3, f"{error.message} (--url or FES_URL says where it is)")
    except FesError as error:
        return _fail(1, error.message)
    except OSError as error:
        if error.filename is None:  # standard input or output, a closed pipe among it
            raise
        return _fail(1, f"{error.filename}: {error.strerror or error}")


def _client(options: argparse.Namespace) -> Client:
    try:
        return Client(options.url, options.api_key or None, options.timeout)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _fail(status: int, message: str) -> int:
    sys.stderr.write(f"fes: {printable(message)}\n")
    return status


def _die_of(name: str, status: int) -> NoReturn:
    """End at once, requests in other threads or not, and let the shell see which signal it was."""
    if (number := getattr(signal, name, None)) is not None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(status)


# Commands that run a task


def caption(client: Client, options: argparse.Namespace) -> int:
    texts = {} if options.text is None else {"text": [read_text(options.text)]}
    task = "image_captioning" if options.text is None else "conditional_image_captioning"
    return _run_files(client, options, task, "image", texts)


def transcribe(client: Client, options: argparse.Namespace) -> int:
    if options.timestamps is not None:
        options.config = {**(options.config or {}), "timestamps": options.timestamps}
    return _run_files(client, options, "automated_speech_recognition", "audio")


def diarize(client: Client, options: argparse.Namespace) -> int:
    return _run_files(client, options, "audio_diarization", "audio")


def classify(client: Client, options: argparse.Namespace) -> int:
    task = "image_classification" if options.classes is None else "zero_shot_image_classification"
    return _run_files(client, options, task, "image", classes=options.classes)


def detect(client: Client, options: argparse.Namespace) -> int:
    files = expand_files(options.files, "image")
    draw = _drawing(Path(options.draw), files) if options.draw else None
    task = "object_detection" if options.classes is None else "zero_shot_object_detection"
    items = combine({"image": files}, _once(options, options.classes))
    return run_batch(client, options, task, items, then=draw)


def read(client: Client, options: argparse.Namespace) -> int:
    return _run_files(client, options, "optical_character_recognition", "image")


def faces(client: Client, options: argparse.Namespace) -> int:
    return _run_files(client, options, "face_embedding", "image")


def _drawing(target: Path, files: Sequence[Value]) -> Callable[[Item, Any], None]:
    """Return what draws the detections over an item's picture: to a file or, for many, to files in a folder."""
    try:
        from feature_extraction_server.client.draw import draw_detections
    except ImportError:
        raise UsageError("--draw needs Pillow: pip install 'feature_extraction_server-client[draw]'") from None
    if len(files) > 1 and not target.is_dir():
        raise UsageError(f"--draw must be a folder that exists, to draw over {len(files)} pictures; {target} is none")
    if any(isinstance(file.value, str) for file in files):
        raise UsageError("--draw needs pictures that are files, not URLs")
    n_named: Counter[str] = Counter()

    def draw(item: Item, detections: Any) -> None:
        name = Path(item.name).stem.strip("-") or "picture"
        n_named[name] += 1
        number = f"-{n_named[name]}" if n_named[name] > 1 else ""
        file = target / f"{name}{number}.png" if target.is_dir() else target
        draw_detections(read_files(item.inputs)["image"].content, detections, file)

    return draw


def embed(client: Client, options: argparse.Namespace) -> int:
    if sum(map(bool, (options.files, options.text, options.query))) != 1:
        raise UsageError("name pictures, or a text by --text, or what is searched for by --query")
    if options.files:
        return _run_files(client, options, "image_embedding", "image")
    items = combine({"text": [read_text(text) for text in options.text or options.query]}, _once(options))
    return run_batch(client, options, "text_embedding" if options.text else "text_query_embedding", items)


def _run_files(
    client: Client,
    options: argparse.Namespace,
    task: str,
    field: str,
    texts: dict[str, list[Value]] | None = None,
    classes: list[str] | None = None,
) -> int:
    files = expand_files(options.files, field)
    items = combine({field: files} | (texts or {}), _once(options, classes))
    return run_batch(client, options, task, items, classes)


def _once(options: argparse.Namespace, classes: list[str] | None = None) -> dict[str, Any]:
    """Return what is sent with every item."""
    return {key: value for key, value in (("config", options.config), ("classes", classes)) if value is not None}


def run_task(client: Client, options: argparse.Namespace) -> int:
    """Run any task: its options come from its schema."""
    given = read_task_arguments(client, options)
    return run_batch(client, options, options.task, given.items, given.classes)


# Commands about the server


def tasks(client: Client, options: argparse.Namespace) -> int:
    rows = [{"task": task, "models": client.models_for(task)} for task in client.list_tasks()]
    return _list(options, rows, lambda row: [row["task"], ", ".join(row["models"]) or "no model"])


def models(client: Client, options: argparse.Namespace) -> int:
    names = client.list_models() if options.task is None else client.models_for(options.task)
    rows = [
        {"model": model, "state": client.status(model)["state"], "tasks": client.tasks_of(model)} for model in names
    ]
    return _list(options, rows, lambda row: [row["model"], row["state"], ", ".join(row["tasks"]) or "no task"])


def status(client: Client, options: argparse.Namespace) -> int:
    rows = [client.status(model) for model in options.models or client.list_models()]

    def cells(row: dict[str, Any]) -> list[str]:
        work = f"{row['running_jobs']} running, {row['queue_depth']} waiting"
        return [row["model"], row["state"], row["error"] or work]

    return _list(options, rows, cells)


def start(client: Client, options: argparse.Namespace) -> int:
    return _each_model(client, options, client.start)


def stop(client: Client, options: argparse.Namespace) -> int:
    if options.all == bool(options.models):
        raise UsageError("name the models to stop, or --all")
    if options.all:
        options.models = [model for model in client.list_models() if client.status(model)["state"] != "stopped"]
    return _each_model(client, options, client.stop)


def plugins(client: Client, options: argparse.Namespace) -> int:
    return _list(options, client.plugins(), lambda row: [row["kind"], row["name"], row["error"] or row["state"]])


def _each_model(client: Client, options: argparse.Namespace, change: Callable[[str], None]) -> int:
    rows, failed = [], False
    for model in options.models:
        try:
            change(model)
            rows.append({"model": model, "state": client.status(model)["state"]})
        except ServerError as error:
            failed = True
            _fail(1, error.message)
    _list(options, rows, lambda row: [row["model"], row["state"]])
    return int(failed)


def _list(options: argparse.Namespace, rows: list[dict[str, Any]], cells: Callable[[dict[str, Any]], list[str]]) -> int:
    if options.json:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        lines = [printable(table([cells(row) for row in rows]))] if rows else []
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def write_plugin(client: Client, options: argparse.Namespace) -> int:
    def schemas_of(task: str) -> dict[str, Any]:
        try:
            return client.describe_task(task)
        except Unreachable as error:
            raise UsageError(f"the task {task} is not installed here, and {error.message}") from None

    folder = new_plugin(options.kind, options.name, options.directory, options.task, schemas_of)
    sys.stdout.write(f"{json.dumps({'folder': str(folder)}, ensure_ascii=False) if options.json else folder}\n")
    return 0


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fes",
        description="Ask a feature extraction server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common_options(defaults=True)],
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    common = common_options(defaults=False)

    def add(
        name: str, command: Callable[..., int], help: str, parents: Sequence[argparse.ArgumentParser] = ()
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, parents=[common, *parents], allow_abbrev=False)
        added.set_defaults(command=command)
        return added

    _add_task_commands(add)
    add("tasks", tasks, "List the tasks, and the models of each.")
    of_task = add("models", models, "List the models: their states and tasks.")
    of_task.add_argument("--task", help="only the models that implement it")
    add("status", status, "Tell the state of models.").add_argument("models", nargs="*", metavar="MODEL")
    add("start", start, "Start models, so that the first request need not wait.").add_argument(
        "models", nargs="+", metavar="MODEL"
    )
    stopped = add("stop", stop, "Stop models, so that they give their memory back.")
    stopped.add_argument("models", nargs="*", metavar="MODEL")
    stopped.add_argument("--all", action="store_true", help="all that are not stopped")
    add("plugins", plugins, "List the plugins, and why some were left out.")
    created = add("new-plugin", write_plugin, "Write a new plugin that works, to start from.")
    created.add_argument("kind", choices=sorted(KINDS), help="what it is")
    created.add_argument(
        "name",
        metavar="NAME",
        help="the module's name, as my_model; a consumer's ends in _consumer, but its folder's does not",
    )
    created.add_argument("--task", help="the task that a model implements")
    created.add_argument("--directory", default=".", help="where the plugin's folder is made (default: here)")
    return parser


def _add_task_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    batch = batch_options()
    batch.add_argument("--config", type=config_object, metavar="JSON", help="arguments of the model's own")
    files = argparse.ArgumentParser(add_help=False)
    files.add_argument("files", nargs="+", metavar="FILE")
    classes: dict[str, Any] = {
        "type": string_list,
        "help": "the classes, as cat,dog or a JSON list (default: those that the model knows)",
    }

    captions = add("caption", caption, "Caption pictures.", [batch, files])
    captions.add_argument("--text", help="a text that the caption continues")
    transcribed = add("transcribe", transcribe, "Write down what is spoken in recordings.", [batch, files])
    transcribed.add_argument("--timestamps", choices=("segments", "words"), help="tell the times of each, too")
    add("diarize", diarize, "Find out who speaks when in recordings.", [batch, files])
    classified = add("classify", classify, "Tell how probable classes are for pictures.", [batch, files])
    classified.add_argument("--classes", **classes)
    detected = add("detect", detect, "Find objects in pictures.", [batch, files])
    detected.add_argument("--classes", **classes)
    detected.add_argument("--draw", metavar="FILE", help="draw them over the picture (for many: the name of a folder)")
    add("read", read, "Read the text in pictures.", [batch, files])
    add("faces", faces, "Find the faces in pictures, and turn each into a vector.", [batch, files])
    embedded = add("embed", embed, "Turn pictures or texts into vectors.", [batch])
    embedded.add_argument("files", nargs="*", metavar="FILE")
    embedded.add_argument("--text", action="append", help="a text in place of pictures; - reads standard input")
    embedded.add_argument("--query", action="append", help="likewise, but a text that is searched for")

    any_task = add("run", run_task, "Run any task: fes run TASK --help tells its options.")
    any_task.add_argument("task", metavar="TASK")
    any_task.add_argument("rest", nargs=argparse.REMAINDER, metavar="...")
