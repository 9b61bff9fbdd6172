"""The task automated speech recognition: the words that are spoken in a recording, and when."""

from typing import Any, NotRequired

from typing_extensions import TypedDict

from feature_extraction_server.core.task import AudioField, ConfigField, FiniteFloat, TaskSpec


class TimedText(TypedDict):
    """A segment or a word: when it begins and ends, in seconds from the beginning of the recording."""

    start: FiniteFloat
    end: FiniteFloat
    text: str


class Transcript(TypedDict):
    """The whole text and the segments that it consists of.

    ``language`` is the code of the spoken one, as ``en``, or null where nothing is said; ``duration`` is the
    recording's, in seconds.
    """

    text: str
    language: str | None
    duration: NotRequired[float]
    segments: list[TimedText]
    words: NotRequired[list[TimedText]]


def with_times_if_asked_for(transcript: Any, inputs: dict[str, Any]) -> Any:
    """Check that there are times just if ``config.timestamps`` is set; keep them in order and within the recording."""
    timestamps = inputs["config"].get("timestamps")
    if timestamps is None:
        if not isinstance(transcript, str):
            raise ValueError("it tells times, which were not asked for")
        return transcript
    if isinstance(transcript, str) or (timestamps == "words" and "words" not in transcript):
        raise ValueError(f"it lacks the times of the {timestamps}")
    duration = inputs["audio"].seconds
    for timed in (*transcript["segments"], *transcript.get("words", ())):
        timed["start"] = round(min(max(timed["start"], 0), duration), 3)
        timed["end"] = round(min(max(timed["end"], timed["start"]), duration), 3)
    return transcript | {"duration": round(duration, 3)}


task = TaskSpec(
    description="Generate text from speech.",
    inputs={
        "audio": AudioField("The audio from which the speech needs to be generated"),
        "config": ConfigField(),
    },
    output=str | Transcript,
    example="good morning",
    postprocess=with_times_if_asked_for,
)
wrap = task.wrap
