"""The task conditional image captioning: captions of an image that continue a given text."""

from typing import Any

from feature_extraction_server.core.task import ConfigField, ImageField, TaskSpec, TextField


def without_prefix(captions: list[str], inputs: dict[str, Any]) -> list[str]:
    """Take the given text, if a caption begins with it, away from the caption.

    Tokenizers may change case and spacing, so that both are ignored in the comparison. The text must end where a word
    ends: "a" is no beginning of "apples on a table".
    """
    return [_strip(caption, inputs["text"]) for caption in captions]


def _strip(caption: str, prefix: str) -> str:
    rest = 0
    for character in prefix:
        if character.isspace():
            continue
        while rest < len(caption) and caption[rest].isspace():
            rest += 1
        if caption[rest : rest + 1].lower() != character.lower():
            return caption.strip()
        rest += 1
    if rest and _is_of_word(caption[rest - 1]) and _is_of_word(caption[rest : rest + 1]):
        return caption.strip()
    return caption[rest:].strip()


def _is_of_word(character: str) -> bool:
    """Tell letters and digits from the rest. Scripts without case are left out: some put no spaces between words."""
    return character.isdigit() or character.lower() != character.upper()


task = TaskSpec(
    description="Generate text captions of an image that continue a given text.",
    inputs={
        "image": ImageField("The image that needs captioning"),
        "text": TextField("A specified prefix for the caption that should be generated"),
        "config": ConfigField(),
    },
    output=list[str],
    example=["that is sitting on a table"],
    postprocess=without_prefix,
)
wrap = task.wrap
