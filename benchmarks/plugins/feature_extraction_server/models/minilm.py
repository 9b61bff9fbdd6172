"""MiniLM-L6 sentence embeddings, 384 numbers a text.

Weights: sentence-transformers/all-MiniLM-L6-v2, Apache 2.0.
"""

from benchmarks.workloads import SentenceEmbedding

model: SentenceEmbedding


def load_model() -> None:
    global model
    model = SentenceEmbedding()


def sentence_embedding(text: list[str]) -> list[list[float]]:
    return model(text)
