"""Vectors of texts by transformers' encoders, which give a state for each token: a text's are pooled to one.

    tokens = tokenize(tokenizer, texts, MAX_TOKENS)
    answer = embed_tokens(model, tokens, mean_of_tokens, config)

Texts of like length go through the model together, so that little of its time is spent on padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from feature_extraction_server.core.embeddings import as_vectors, with_token_counts
from feature_extraction_server.core.torch_threads import in_parallel, share

if TYPE_CHECKING:
    import torch

#: Padding that is cheaper than another call: on a CPU, a call takes as long as so many tokens more.
PADDING_A_CALL: Final = 32
#: How many tokens, padding included, go through the model at once, unless a single text has more: this bounds memory.
TOKENS_A_CALL: Final = 16_384
#: No language has so many characters a token; it saves tokenizing what is cut off anyway.
CHARACTERS_A_TOKEN: Final = 64

#: ``pool(states, lengths)`` makes one vector a text of its tokens' states, float32 (n_texts, n_tokens, n_dimensions);
#: ``lengths``, int64 (n_texts, 1), tells how many of the states are the text's, which come first.
Pool = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def tokenize(
    tokenizer: Any, texts: list[str], max_tokens: int, prefix: str = "", end: int | None = None
) -> list[list[int]]:
    """Return each text's tokens, with the tokenizer's own at the ends, cut off after ``max_tokens``.

    Args:
        tokenizer: one of transformers'.
        texts: white space at their ends does not count.
        max_tokens: as many as the model was trained on.
        prefix: what the model reads before each text.
        end: the token that ends each text, where not every tokenizer of the model adds it.
    """
    tokens: list[list[int]] = tokenizer(
        [prefix + text.strip()[: max_tokens * CHARACTERS_A_TOKEN] for text in texts],
        truncation=True,
        max_length=max_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    if end is None:
        return tokens
    return [row if row[-1] == end else [*row[: max_tokens - 1], end] for row in tokens]


def embed_tokens(
    model: Any, tokens: list[list[int]], pool: Pool, config: dict[str, Any], tokens_a_call: int = TOKENS_A_CALL
) -> list[Any]:
    """Return the vectors of tokenized texts as the tasks answer them, float32 (n_dimensions,) each.

    Args:
        model: one of transformers' models that give ``last_hidden_state``.
        tokens: each text's, as ``tokenize`` gives them.
        pool: ``mean_of_tokens`` or ``last_token``.
        config: the request's, as ``TextEmbeddingConfig`` checked it.
        tokens_a_call: how many tokens, padding included, go through the model at once.
    """
    import torch

    lengths = [len(row) for row in tokens]

    def embed(group: list[int]) -> torch.Tensor:
        return _pooled(model, [tokens[index] for index in group], pool)

    if model.device.type == "cpu":
        a_core_s = min(tokens_a_call, -(-sum(lengths) // share()))
        groups = group_by_length(lengths, PADDING_A_CALL, a_core_s)
        parts = in_parallel(embed, groups)
    else:  # a GPU takes as long for a call as for thousands of tokens, so that only memory counts
        groups = group_by_length(lengths, tokens_a_call, tokens_a_call)
        parts = [embed(group) for group in groups]
    vectors = torch.cat(parts)[torch.tensor([index for group in groups for index in group]).argsort()]
    return with_token_counts(as_vectors(vectors, config), lengths, config)


def group_by_length(lengths: list[int], max_padding: int, tokens_a_call: int) -> list[list[int]]:
    """Put texts of like length together, the longest first; return each group's indices.

    Args:
        lengths: in tokens, of each text.
        max_padding: with how many tokens of padding a group may be filled up to the length of its longest text.
        tokens_a_call: how many tokens a group may have, padding included, unless it is a single text.
    """
    groups: list[list[int]] = []
    n_padded = longest = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        n_padded += longest - lengths[index]
        if not groups or n_padded > max_padding or (len(groups[-1]) + 1) * longest > tokens_a_call:
            groups.append([])
            n_padded, longest = 0, lengths[index]
        groups[-1].append(index)
    return groups


def mean_of_tokens(states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the mean of the states of each text's tokens; a ``Pool``."""
    import torch

    if states.shape[1] == int(lengths.min()):
        return states.mean(dim=1)
    mask = torch.arange(states.shape[1], device=states.device) < lengths
    return (mask.float().unsqueeze(1) @ states).squeeze(1) / lengths


def last_token(states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the state of each text's last token; a ``Pool``."""
    import torch

    return states[torch.arange(len(states), device=states.device), lengths.squeeze(1) - 1]


def _pooled(model: Any, tokens: list[list[int]], pool: Pool) -> torch.Tensor:
    """Return the vectors of texts, the longest of which comes first, after one call of the model."""
    import torch

    longest, shortest = len(tokens[0]), len(tokens[-1])
    padding = model.config.pad_token_id or 0  # of a model that knows none, any token will do
    input_ids = torch.tensor([row + [padding] * (longest - len(row)) for row in tokens], device=model.device)
    lengths = torch.tensor([[len(row)] for row in tokens], device=model.device)
    # Without a mask, which equal lengths do not need, attention is faster.
    mask = None if shortest == longest else torch.arange(longest, device=model.device) < lengths
    with torch.inference_mode():
        states: torch.Tensor = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return pool(states.float(), lengths)
