"""The task audio diarization: who speaks when in a recording."""

from typing import Annotated, Any

from pydantic import BeforeValidator
from typing_extensions import TypedDict

from feature_extraction_server.core.task import AudioField, ConfigField, FiniteFloat, TaskSpec


class Segment(TypedDict):
    """A time in which one speaker speaks: its beginning and its end, in seconds from the recording's beginning."""

    start: FiniteFloat
    end: FiniteFloat
    speaker: Annotated[str, BeforeValidator(str)]


def in_order_of_appearance(segments: list[Segment], inputs: dict[str, Any]) -> list[Segment]:
    """Keep the segments within the recording, sort them by their start, and number the speakers as they come."""
    duration = inputs["audio"].seconds
    for segment in segments:
        if segment["start"] > segment["end"]:
            raise ValueError("a segment ends before it begins")
        for edge in ("start", "end"):
            segment[edge] = round(min(max(segment[edge], 0), duration), 3)
    segments = [segment for segment in segments if segment["start"] < segment["end"]]
    segments.sort(key=lambda segment: (segment["start"], segment["end"]))
    names: dict[str, str] = {}
    for segment in segments:
        segment["speaker"] = names.setdefault(segment["speaker"], f"speaker_{len(names)}")
    return segments


task = TaskSpec(
    description="Find out who speaks when in a recording.",
    inputs={
        "audio": AudioField("The recording whose speakers need to be told apart"),
        "config": ConfigField(),
    },
    output=list[Segment],
    example=[
        {"start": 0.4, "end": 3.86, "speaker": "speaker_0"},
        {"start": 4.25, "end": 7.25, "speaker": "speaker_1"},
    ],
    postprocess=in_order_of_appearance,
)
wrap = task.wrap
