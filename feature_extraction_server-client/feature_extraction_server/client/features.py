"""The tasks as methods of the Python client: what they take by name, and what they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from feature_extraction_server.client.media import Media, as_media

Config = Mapping[str, Any] | None


class Detections(TypedDict):
    """The objects in a picture: the lists have one element an object, a box is [xmin, ymin, xmax, ymax] in pixels."""

    boxes: list[list[float]]
    labels: list[str]
    scores: list[float]


class Face(TypedDict):
    """A face: its box, [xmin, ymin, xmax, ymax] in pixels, how sure the model is of it, and its vector."""

    box: list[float]
    score: float
    embedding: list[float]


class SpeakerSegment(TypedDict):
    """When a speaker speaks: from ``start`` to ``end``, in seconds."""

    start: float
    end: float
    speaker: str


class Features(ABC):
    """A method for each task. A string that stands for a picture or a recording names a file or is a URL.

    Each method takes the model's name (None: the task's default one) and the model's ``config``, and raises what
    ``Client.run`` does.
    """

    @abstractmethod
    def _run(self, task: str, model: str | None, inputs: Mapping[str, Any]) -> Any:
        """Run a task and return its result; an input that is None is not sent."""

    def caption(
        self, image: Media | str, text: str | None = None, model: str | None = None, config: Config = None
    ) -> list[str]:
        """Return captions of a picture; with ``text``, such as continue it."""
        task = "image_captioning" if text is None else "conditional_image_captioning"
        return self._run(task, model, {"image": as_media(image), "text": text, "config": config})  # type: ignore[no-any-return]

    def transcribe(
        self,
        audio: Media | str,
        model: str | None = None,
        config: Config = None,
        timestamps: Literal["segments", "words"] | None = None,
    ) -> Any:
        """Return what is spoken in a recording: a text or, with ``timestamps``, a dict with the times as well."""
        if timestamps is not None:
            config = {**(config or {}), "timestamps": timestamps}
        return self._run("automated_speech_recognition", model, {"audio": as_media(audio), "config": config})

    def diarize(self, audio: Media | str, model: str | None = None, config: Config = None) -> list[SpeakerSegment]:
        """Return who speaks when in a recording."""
        return self._run("audio_diarization", model, {"audio": as_media(audio), "config": config})  # type: ignore[no-any-return]

    def classify(
        self,
        image: Media | str,
        classes: Sequence[str] | None = None,
        model: str | None = None,
        config: Config = None,
    ) -> dict[str, float]:
        """Return the probability of each class for a picture; without ``classes``, of its likeliest ones."""
        inputs: dict[str, Any] = {"image": as_media(image), "config": config}
        if classes is None:
            found = self._run("image_classification", model, inputs)
            return dict(zip(found["labels"], found["scores"], strict=True))
        inputs["classes"] = list(classes)
        return dict(zip(classes, self._run("zero_shot_image_classification", model, inputs), strict=True))

    def detect(
        self,
        image: Media | str,
        model: str | None = None,
        config: Config = None,
        classes: Sequence[str] | None = None,
    ) -> Detections:
        """Return the objects in a picture: of ``classes`` or, without them, of the classes that the model knows."""
        inputs: dict[str, Any] = {"image": as_media(image), "config": config}
        if classes is None:
            return self._run("object_detection", model, inputs)  # type: ignore[no-any-return]
        return self._run("zero_shot_object_detection", model, inputs | {"classes": list(classes)})  # type: ignore[no-any-return]

    def read(self, image: Media | str, model: str | None = None, config: Config = None) -> Any:
        """Return the text in a picture; with ``{"detail": True}`` in ``config``, its lines with their boxes."""
        return self._run("optical_character_recognition", model, {"image": as_media(image), "config": config})

    def faces(self, image: Media | str, model: str | None = None, config: Config = None) -> list[Face]:
        """Return the faces in a picture, the largest first."""
        return self._run("face_embedding", model, {"image": as_media(image), "config": config})  # type: ignore[no-any-return]

    def embed(self, image: Media | str, model: str | None = None, config: Config = None) -> list[float]:
        """Return the embedding of a picture."""
        return self._run("image_embedding", model, {"image": as_media(image), "config": config})  # type: ignore[no-any-return]

    def embed_text(self, text: str, model: str | None = None, config: Config = None) -> list[float]:
        """Return the embedding of a text, such as is searched."""
        return self._run("text_embedding", model, {"text": text, "config": config})  # type: ignore[no-any-return]

    def embed_query(self, text: str, model: str | None = None, config: Config = None) -> list[float]:
        """Return the embedding of a text that is searched for."""
        return self._run("text_query_embedding", model, {"text": text, "config": config})  # type: ignore[no-any-return]
