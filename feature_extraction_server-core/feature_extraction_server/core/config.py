"""The ``config`` of a request: which keys a model takes for a task, checked before anything is queued or loaded.

A model plugin declares them with a pydantic class a task:

    class DetectionConfig(Config):
        threshold: float = Field(0.1, ge=0, le=1)

    config_types = {"object_detection": DetectionConfig}

Its functions then receive ``config`` as a dict with the keys that the client sent, all of them allowed.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from feature_extraction_server.core.errors import InvalidInput

MAX_NEW_TOKENS = 1024


class Config(BaseModel):
    """Base of all config declarations: unknown keys are refused, and no value is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerationConfig(Config):
    """What a client may ask of a model that generates text: transformers' generation arguments that are safe.

    Left out on purpose: whatever loads code or files, takes callables, or changes the type of the output.
    """

    max_new_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    min_new_tokens: int | None = Field(None, ge=0, le=MAX_NEW_TOKENS)
    max_length: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    min_length: int | None = Field(None, ge=0, le=MAX_NEW_TOKENS)
    num_beams: int = Field(1, ge=1, le=16)
    num_return_sequences: int = Field(1, ge=1, le=16)
    do_sample: bool = False
    temperature: float | None = Field(None, gt=0, le=100)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    length_penalty: float | None = Field(None, ge=-100, le=100)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=100)
    early_stopping: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> GenerationConfig:
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            raise ValueError("num_return_sequences may not exceed num_beams (1 by default) unless do_sample is true")
        for shortest, longest in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
            low, high = getattr(self, shortest), getattr(self, longest)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{shortest} may not exceed {longest}")
        return self


def check_config(config_type: type[Config], config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the keys that the client set, or raise InvalidInput naming the one at fault."""
    try:
        checked = config_type.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(["config", *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            known = ", ".join(config_type.model_fields) or "no keys"
            raise InvalidInput(f"unknown key {field}: for this model, config takes {known}", field=field) from None
        raise InvalidInput(f"{field}: {first['msg'].removeprefix('Value error, ')}", field=field) from None
    return {key: value for key in checked.model_fields_set if (value := getattr(checked, key)) is not None}
