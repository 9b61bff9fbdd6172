"""all-MiniLM-L6-v2: vectors of English sentences and short paragraphs, by which texts of like meaning are found.

Weights: sentence-transformers/all-MiniLM-L6-v2, Apache-2.0. Paper: https://arxiv.org/abs/2002.10957 (MiniLM),
https://arxiv.org/abs/1908.10084 (Sentence-BERT)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import TextEmbeddingConfig
from feature_extraction_server.core.embeddings import as_vectors, with_token_counts
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 256  # the model was trained on texts cut off there, though it has more positions
MAX_CHARACTERS = 16_384  # saves tokenizing what is cut off anyway
CALL_TOKENS = 32  # a call of the model takes as long as so many tokens more

config_types = {"text_embedding": TextEmbeddingConfig, "text_query_embedding": TextEmbeddingConfig}

checkpoint: Checkpoint
model: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2")


def load_model() -> None:
    global model, tokenizer
    from transformers import AutoModel, AutoTokenizer

    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(AutoModel, may_lack=("pooler.",))


def text_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    import torch

    tokens: list[list[int]] = tokenizer(
        [one.strip()[:MAX_CHARACTERS] for one in text],
        truncation=True,
        max_length=MAX_TOKENS,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    lengths = [len(row) for row in tokens]
    means = torch.empty(len(text), model.config.hidden_size, device=model.device)
    with torch.inference_mode():
        for group in _groups(lengths):
            means[group] = _means([tokens[index] for index in group])
    return with_token_counts(as_vectors(means, config), lengths, config)


text_query_embedding = text_embedding  # the model was trained on pairs of texts, neither of which is a query


def _groups(lengths: list[int]) -> list[list[int]]:
    """Put texts of like length together, so that what padding costs is less than what another call would."""
    groups: list[list[int]] = []
    n_padded = longest = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        n_padded += longest - lengths[index]
        if not groups or n_padded > CALL_TOKENS:
            groups.append([])
            n_padded, longest = 0, lengths[index]
        groups[-1].append(index)
    return groups


def _means(tokens: list[list[int]]) -> torch.Tensor:
    """Return the mean over each text's tokens of what the model makes of them, (n_texts, n_dimensions)."""
    import torch

    longest = len(tokens[0])
    padding = tokenizer.pad_token_id
    input_ids = torch.tensor([row + [padding] * (longest - len(row)) for row in tokens], device=model.device)
    if len(tokens[-1]) == longest:
        hidden: torch.Tensor = model(input_ids=input_ids).last_hidden_state
        return hidden.float().mean(dim=1)
    lengths = torch.tensor([[len(row)] for row in tokens], device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths
    hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    return (mask.float().unsqueeze(1) @ hidden.float()).squeeze(1) / lengths
