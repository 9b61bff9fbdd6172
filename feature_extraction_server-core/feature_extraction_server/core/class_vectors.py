"""The vectors of the classes that clients name: each class is embedded once, not with every image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

#: A thousand classes take 2 MB where a vector has 512 numbers.
MAX_KEPT: Final = 4096


class ClassVectors:
    """Embeds classes and keeps the vectors of those that were named last. For one thread.

    Who classifies images names the same classes each time, and a few of them take a model as long as an image.

    Args:
        embed: returns the vectors of texts, (n_texts, n_dimensions).
        max_kept: of how many texts vectors are kept.
    """

    def __init__(self, embed: Callable[[list[str]], torch.Tensor], max_kept: int = MAX_KEPT) -> None:
        self._embed = embed
        self._max_kept = max_kept
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the texts' vectors, (n_texts, n_dimensions)."""
        import torch

        named = dict.fromkeys(texts)
        if new := [text for text in named if text not in self._kept]:
            # Copies, since a row of a tensor keeps all of its rows.
            self._kept.update((text, row.clone()) for text, row in zip(new, self._embed(new), strict=True))
        for text in named:
            self._kept.move_to_end(text)
        vectors = torch.stack([self._kept[text] for text in texts])
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)
        return vectors
