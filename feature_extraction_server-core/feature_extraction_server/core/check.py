"""Try a model on sample inputs, and tell what it is like: for people who write plugins.

    python -m feature_extraction_server.core.check blip
    python -m feature_extraction_server.core.check blip --json

The model runs in a real engine, with the settings that a server would have. For each of its tasks, the samples
(``core/samples.py``) are sent one by one and as a batch; what comes back must be what the task promises, the same both
times, and in the batch's order. Then the model is stopped, which must give its memory back, and started again, which
must change no answer. The exit status is 1 where something of that does not hold, which is told in a sentence.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from feature_extraction_server.core import subprocesses
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import ServerError
from feature_extraction_server.core.resources import resident_bytes
from feature_extraction_server.core.samples import samples_of
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine

#: How far numbers of a batch's answers may be from those of single ones, by precision; of large numbers, relatively.
TOLERANCES: Final = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
#: What may stay of a model's memory when it is stopped, at least, and as a part of what it took.
KEPT_BYTES: Final = 32 << 20
KEPT_PART: Final = 0.25
#: Shorter lists of numbers are boxes or probabilities.
SHORTEST_VECTOR: Final = 8
LENGTH_TOLERANCE: Final = 1e-2
BATCH_ITEMS: Final = 8
#: How many times as long as a speed is measured a call takes that is slow in itself, not for being the first.
LONG_CALL: Final = 5

Report = dict[str, Any]


class Wrong(Exception):
    """A model does something that it must not."""


class Trial:
    """A task of a model, and its sample inputs."""

    def __init__(self, engine: Engine, model: str, task: str) -> None:
        self.task: Final = task
        self.samples: Final = samples_of(engine.registry, model, task)
        self.tolerance = TOLERANCES["float32"]
        self._run: Callable[[dict[str, Any]], Any] = lambda payload: engine.run(task, model, payload)
        spec = engine.registry.spec(task)
        self._batch_fields = spec.batch_fields if spec else tuple(self.samples[0] if self.samples else ())

    def single(self, sample: Mapping[str, Any]) -> Any:
        """Return the answer to one input."""
        return self._run(dict(sample))

    def batch(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """Return the answers to several inputs, sent together."""
        lists = {key: [sample[key] for sample in samples] for key in samples[0] if key in self._batch_fields}
        return self._run({**samples[0], **lists})

    def compare(self) -> list[Any]:
        """Return the single answers, once a batch has given the same ones in the same order.

        Raises:
            ServerError: the model raised it, or its answer is not what the task promises.
            Wrong: the answers differ.
        """
        singles = [self.single(sample) for sample in self.samples]
        batch = self.batch(self.samples)
        wrong = [n for n, pair in enumerate(zip(singles, batch, strict=True)) if self.difference(*pair) is not None]
        if not wrong:
            return singles
        n = wrong[0]
        elsewhere = [other for other, answer in enumerate(batch) if self.difference(singles[n], answer) is None]
        if elsewhere:
            raise Wrong(f"the order is not kept: the batch's answer {elsewhere[0]} is the one to its input {n}")
        where = self.difference(singles[n], batch[n])
        raise Wrong(f"input {n} gets another answer in a batch than alone: {where}")

    def difference(self, one: Any, other: Any) -> str | None:
        """Say where two answers differ by more than numbers may; None where they do not."""
        return _difference(one, other, self.tolerance, "")


def check(engine: Engine, model: str, measured_seconds: float = 1.0) -> Report:
    """Try a model, and return what was found, JSON-ready; ``failures`` has a sentence for each thing that is wrong.

    Args:
        engine: one in this process, in which nothing else is at work.
        measured_seconds: how long the speed of each task is measured, once with single items and once with batches.

    Raises:
        ServerError: there is no such model, or it cannot be loaded.
    """
    engine.start(model, wait=True)
    try:
        status = engine.status(model)
        report: Report = {"model": model, **status["provenance"], "load_seconds": status["load_seconds"]}
        report |= {"tasks": {}, "failures": []}
        fail = report["failures"].append
        answered: list[tuple[Trial, Any]] = []
        for task in engine.tasks_of(model):
            trial = Trial(engine, model, task)
            trial.tolerance = TOLERANCES.get(report["dtype"], trial.tolerance)
            report["tasks"][task] = {"samples": len(trial.samples)}
            if not trial.samples:
                continue
            try:
                answers = trial.compare()
                answered.append((trial, answers[0]))
                report["tasks"][task] |= _describe(answers) | measure(trial, measured_seconds)
            except (ServerError, Wrong) as error:
                fail(f"{task}: {error}")
        report["memory"] = _restart(engine, model, answered, fail)
        return report
    finally:
        engine.stop(model, wait=True)


def _difference(one: Any, other: Any, tolerance: float, place: str) -> str | None:
    numbers = (int, float)
    if isinstance(one, numbers) and isinstance(other, numbers) and not isinstance(one, bool):
        near = abs(one - other) <= tolerance * max(1, abs(one), abs(other))
        return None if near else f"{one} alone, {other} there{place}"
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        parts = ((a, b, f"{place}[{n}]") for n, (a, b) in enumerate(zip(one, other, strict=True)))
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        parts = ((one[key], other[key], f"{place}.{key}") for key in one)
    else:
        return None if one == other else f"{_short(one)} alone, {_short(other)} there{place}"
    return next((found for part in parts if (found := _difference(*part[:2], tolerance, part[2])) is not None), None)


def _describe(answers: list[Any]) -> Report:
    """Return what vectors there are in answers: how many numbers each has, and whether its length is 1."""
    told: Report = {"distinct_answers": len({json.dumps(answer) for answer in answers})}
    vectors = list(_vectors(answers))
    if not vectors:
        return told
    sizes = sorted({len(vector) for vector in vectors})
    normalized = all(abs(math.hypot(*vector) - 1) < LENGTH_TOLERANCE for vector in vectors)
    return told | {"vector_length": sizes[0] if len(sizes) == 1 else sizes, "normalized": normalized}


def _vectors(answer: Any) -> Iterator[list[float]]:
    if isinstance(answer, dict):
        answer = list(answer.values())
    if not isinstance(answer, list):
        return
    if len(answer) >= SHORTEST_VECTOR and all(isinstance(number, float) for number in answer):
        yield answer
    else:
        for part in answer:
            yield from _vectors(part)


def measure(trial: Trial, seconds: float) -> Report:
    """Return how many items a second a task manages, sent one by one and in batches, decoding included.

    Args:
        trial: the task and its samples.
        seconds: how long each of both speeds is measured; 0 for one call each.
    """
    batch = [trial.samples[n % len(trial.samples)] for n in range(BATCH_ITEMS)]
    return {
        "single_items_per_second": rate(lambda n: trial.single(trial.samples[n % len(trial.samples)]), 1, seconds),
        "batch_items": BATCH_ITEMS,
        "batch_items_per_second": rate(lambda n: trial.batch(batch), BATCH_ITEMS, seconds),
    }


def rate(call: Callable[[int], Any], n_items: int, seconds: float) -> float:
    """Return how many items a second calls manage that are made one after the other.

    Args:
        call: computes the answer to ``n_items`` items; it is given how many calls there were before.
        n_items: of each call.
        seconds: how long it is measured, after a first call that does not count unless it is a long one; 0 for the
            first call alone.
    """
    began = time.monotonic()
    call(0)
    n = 1
    if time.monotonic() - began < LONG_CALL * seconds:
        n, began = 0, time.monotonic()
    while n == 0 or time.monotonic() - began < seconds:
        call(n)
        n += 1
    return float(f"{n * n_items / (time.monotonic() - began):.3g}")


def _restart(
    engine: Engine, model: str, answered: list[tuple[Trial, Any]], fail: Callable[[str], None]
) -> dict[str, int]:
    """Stop, start and stop a model that has run, and return what it takes and what it keeps of memory, in bytes.

    Its libraries were loaded by its first start, and stay. A model that seems to keep memory gets a second chance: the
    C library, too, keeps some for a thread that has ended, but not once more for the next one.
    """
    for _ in range(2):
        loaded, kept = _restart_once(engine, model, answered, fail)
        if kept <= max(KEPT_BYTES, KEPT_PART * loaded):
            break
    else:
        fail(f"it keeps memory when it is stopped: {kept / 1e6:,.0f} MB more than before, of {loaded / 1e6:,.0f}")
    return {"loaded_bytes": loaded, "kept_bytes": kept}


def _restart_once(
    engine: Engine, model: str, answered: list[tuple[Trial, Any]], fail: Callable[[str], None]
) -> tuple[int, int]:
    def resident() -> int:
        return resident_bytes({os.getpid(), *engine.status(model)["pids"]}) or 0

    engine.stop(model, wait=True)
    before = resident()
    engine.start(model, wait=True)
    for trial, first in answered:
        if (where := trial.difference(first, trial.single(trial.samples[0]))) is not None:
            fail(f"{trial.task}: after a stop and a start, the same input gets another answer: {where}")
    loaded = max(0, resident() - before)  # only now, since weights are read from their file when they are first used
    engine.stop(model, wait=True)
    return loaded, max(0, resident() - before)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def card(report: Report) -> str:
    """Return a report as text for people."""
    megabytes = {key: f"{n_bytes / 1e6:,.1f}" for key, n_bytes in report["memory"].items()}
    lines = [
        report["model"],
        f"  checkpoint  {report['checkpoint'] or '-'}, revision {report['revision'] or '-'}",
        f"  runs        on {report['device'] or '-'}, in {report['dtype'] or '-'}",
        f"  loading     {report['load_seconds']:.2f} s the first time",
        f"  memory      {megabytes['loaded_bytes']} MB at work, {megabytes['kept_bytes']} MB when it is stopped",
    ]
    for task, told in report["tasks"].items():
        if not told["samples"]:
            lines.append(f"  {task}: not tried, since neither the task nor the model has samples")
        if "batch_items" not in told:
            continue
        lines.append(f"  {task}: {told['distinct_answers']} different answers to {told['samples']} samples")
        if "vector_length" in told:
            normalized = "of length 1" if told["normalized"] else "not normalised"
            lines.append(f"    vectors of {told['vector_length']} numbers, {normalized}")
        lines.append(
            f"    items a second: {told['single_items_per_second']:,g} singly, "
            f"{told['batch_items_per_second']:,g} in batches of {told['batch_items']}"
        )
    lines += [f"FAILED {sentence}" for sentence in report["failures"]] or ["  everything holds"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the model that the command line names, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m feature_extraction_server.core.check",
        description="Try a model on sample inputs, and tell what it is like.",
    )
    parser.add_argument("model", metavar="MODEL", help="the model plugin's name")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each speed is measured (default: 1)")
    given = parser.parse_args(arguments)
    engine = build_engine(SettingsManager({"LOG_LEVEL": "WARNING"} | os.environ), kinds=subprocesses.KINDS)
    try:
        report = check(engine, given.model, given.seconds)
    except ServerError as error:
        sys.stderr.write(f"FAILED {error.message}\n")
        return 1
    finally:
        engine.close()
    sys.stdout.write(json.dumps(report, indent=2) + "\n" if given.json else card(report))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
