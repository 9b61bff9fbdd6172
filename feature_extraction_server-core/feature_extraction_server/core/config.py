"""The ``config`` of a request: which keys a model takes for a task, checked before anything is queued or loaded.

A model plugin declares them with a pydantic class a task:

    class DetectionConfig(Config):
        threshold: float = Field(0.1, ge=0, le=1)

    config_types = {"object_detection": DetectionConfig}

Its functions then receive ``config`` as a dict with the keys that the client sent, all of them allowed.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from feature_extraction_server.core.errors import InvalidInput

MAX_NEW_TOKENS = 1024
DEFAULT_TOP_K = 5
MAX_SPEAKERS = 100


class Config(BaseModel):
    """Base of all config declarations: unknown keys are refused, and no value is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerationConfig(Config):
    """What a client may ask of a model that generates text: transformers' generation arguments that are safe.

    Left out on purpose: whatever loads code or files, takes callables, or changes the type of the output. The bounds
    keep the arithmetic of a half-precision model finite.
    """

    max_new_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    min_new_tokens: int | None = Field(None, ge=0, le=MAX_NEW_TOKENS)
    max_length: int | None = Field(None, ge=2, le=MAX_NEW_TOKENS)
    min_length: int | None = Field(None, ge=0, le=MAX_NEW_TOKENS)
    num_beams: int = Field(1, ge=1, le=16)
    num_return_sequences: int = Field(1, ge=1, le=16)
    do_sample: bool = False
    temperature: float | None = Field(None, ge=0.01, le=100)
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    length_penalty: float | None = Field(None, ge=-5, le=5)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=100)
    early_stopping: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> GenerationConfig:
        if self.num_return_sequences > self.num_beams and (self.num_beams > 1 or not self.do_sample):
            raise ValueError(
                "num_return_sequences may not exceed num_beams (1 by default), unless do_sample is true and num_beams 1"
            )
        for first, second in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise ValueError(f"{first} and {second} exclude each other")
        for shortest, longest in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
            low, high = getattr(self, shortest), getattr(self, longest)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{shortest} may not exceed {longest}")
        for key in ("temperature", "top_k", "top_p"):
            if getattr(self, key) is not None and not self.do_sample:
                raise ValueError(f"{key} has no effect unless do_sample is true")
        for key in ("length_penalty", "early_stopping"):
            if getattr(self, key) is not None and self.num_beams == 1:
                raise ValueError(f"{key} has no effect unless num_beams is more than 1")
        return self


class CatalogueConfig(Config):
    """What a client may ask of a model that compares an image with the names of classes."""

    template: str = Field("{}", max_length=200)

    @field_validator("template")
    @classmethod
    def _has_one_place(cls, template: str) -> str:
        if template.count("{}") != 1:
            raise ValueError("it must hold {} once, in the place of a class's name")
        return template


class ClassificationConfig(Config):
    """What a client may ask of a model that tells which of the classes that it knows an image shows."""

    top_k: int = Field(DEFAULT_TOP_K, ge=1)


class EmbeddingConfig(Config):
    """What a client may ask of a model that makes vectors."""

    normalize: bool = True


class TextEmbeddingConfig(EmbeddingConfig):
    """What a client may ask of a model that makes vectors of texts."""

    count_tokens: bool = False


class DiarizationConfig(Config):
    """What a client may ask of a model that tells speakers apart: how many there are, or within which bounds."""

    num_speakers: int | None = Field(None, ge=1, le=MAX_SPEAKERS)
    min_speakers: int | None = Field(None, ge=1, le=MAX_SPEAKERS)
    max_speakers: int | None = Field(None, ge=1, le=MAX_SPEAKERS)

    @model_validator(mode="after")
    def _fits_together(self) -> DiarizationConfig:
        low, high = self.min_speakers, self.max_speakers
        if self.num_speakers is not None and (low is not None or high is not None):
            raise ValueError("num_speakers excludes min_speakers and max_speakers")
        if low is not None and high is not None and low > high:
            raise ValueError("min_speakers may not exceed max_speakers")
        return self


def check_config(config_type: type[Config], config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the keys that the client set, or raise InvalidInput naming the one at fault."""
    try:
        checked = config_type.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = "config" + "".join(f"[{part}]" if isinstance(part, int) else f".{part[:40]}" for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(config_type.model_fields) or "no keys"
            raise InvalidInput(f"unknown key {field}: for this model, config takes {known}", field=field) from None
        raise InvalidInput(f"{field}: {first['msg'].removeprefix('Value error, ')}", field=field) from None
    return {key: value for key in checked.model_fields_set if (value := getattr(checked, key)) is not None}
