"""MiniLM-L6 sentence embeddings, 384 numbers a text.

Weights: sentence-transformers/all-MiniLM-L6-v2, Apache 2.0.
"""

from benchmarks.workloads import SentenceEmbedding
from feature_extraction_server.core.text_encoder import PADDING_A_CALL, group_by_length
from feature_extraction_server.core.torch_threads import in_parallel, share

model: SentenceEmbedding


def load_model() -> None:
    global model
    model = SentenceEmbedding()


def sentence_embedding(text: list[str]) -> list[list[float]]:
    n_words = [len(one.split()) for one in text]
    groups = group_by_length(n_words, PADDING_A_CALL, -(-sum(n_words) // share()))
    parts = in_parallel(lambda group: model([text[index] for index in group]), groups)
    answers = {
        index: answer
        for group, part in zip(groups, parts, strict=True)
        for index, answer in zip(group, part, strict=True)
    }
    return [answers[index] for index in range(len(text))]
