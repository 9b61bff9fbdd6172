"""Embeddings of class names, for models that compare images with texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

#: How many texts go through the model at once: a catalogue may hold a thousand.
TEXTS_A_CALL: Final = 128
#: Far more than the tokens that a model reads can hold; it saves tokenizing the rest.
MAX_CHARACTERS: Final = 4096


def embed_texts(
    model: Any, tokenizer: Any, classes: list[str], config: dict[str, Any], **arguments: Any
) -> torch.Tensor:
    """Return the embeddings of classes' names, float32 (n_classes, n_dimensions), L2-normalised.

    Args:
        model: one of transformers' models that have ``get_text_features``.
        tokenizer: the model's.
        classes: the names; each is cut off at as many tokens as the model reads.
        config: the request's, as ``CatalogueConfig`` checked it.
        arguments: more arguments of the tokenizer.
    """
    import torch

    template = config.get("template", "{}")
    sentences = [template.replace("{}", name[:MAX_CHARACTERS]) for name in classes]
    n_positions = model.config.text_config.max_position_embeddings
    tokens = tokenizer(
        sentences, truncation=True, max_length=n_positions, return_tensors="pt", **({"padding": True} | arguments)
    )
    with torch.inference_mode():
        embeddings = [
            model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output.float()
            for input_ids, attention_mask in zip(
                tokens["input_ids"].to(model.device).split(TEXTS_A_CALL),
                tokens["attention_mask"].to(model.device).split(TEXTS_A_CALL),
                strict=True,
            )
        ]
        return torch.nn.functional.normalize(torch.cat(embeddings))
