"""`Documents`: statistics per packed document, so that quantised kernels keep documents independent."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from axattn.hf.transfers import on_device

_BLOCK = 256  # tokens that one thread reduces; the blocks of a long document are reduced again
_CHUNK = 128  # chunk lengths are a multiple of this
_MAX_CHUNKS = 64  # per document: each chunk reads the statistics of all of them


class Documents:
    """Non-empty packed documents.

    Attributes:
        lengths: tokens of each document.
        device: where the statistics are computed.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.device = device

    @cached_property
    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens per block, and blocks per document."""
        counts = [-(-length // _BLOCK) for length in self.lengths]
        sizes = [min(_BLOCK, length - start) for length in self.lengths for start in range(0, length, _BLOCK)]
        return on_device(torch.tensor(sizes), self.device), on_device(torch.tensor(counts), self.device)

    @cached_property
    def _tokens(self) -> torch.Tensor:
        return on_device(torch.tensor(self.lengths), self.device)

    @cached_property
    def document_ids(self) -> torch.Tensor:
        """int32 ``[tokens]``: each token's document index."""
        return self.spread(torch.arange(len(self.lengths), dtype=torch.int32, device=self.device))

    @cached_property
    def chunks(self) -> torch.Tensor:
        """Int32 ``[chunks, 5]``: document, first token and end of each chunk, and its document's first chunk and end.

        The chunks of a document depend on its length only, so results don't depend on its neighbours.
        """
        table: list[tuple[int, ...]] = []
        start = 0
        for document, length in enumerate(self.lengths):
            step = _CHUNK * -(-length // (_CHUNK * _MAX_CHUNKS))
            own = (len(table), len(table) + -(-length // step))
            table += [(document, start + a, start + min(a + step, length), *own) for a in range(0, length, step)]
            start += length
        return torch.tensor(table, dtype=torch.int32).reshape(-1, 5).to(self.device)

    def _reduce(self, x: torch.Tensor, how: str) -> torch.Tensor:
        sizes, counts = self._blocks
        partial = torch.segment_reduce(x, how, lengths=sizes, axis=0, unsafe=True)
        return torch.segment_reduce(partial, how, lengths=counts, axis=0, unsafe=True)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 ``[documents, H, D]``: the mean over each document's tokens of `x` ``[tokens, H, D]``."""
        return self._reduce(x.float(), "sum") / self._tokens[:, None, None]

    def spread(self, statistic: torch.Tensor) -> torch.Tensor:
        """``[tokens, ...]``: each document's value of ``[documents, ...]`` for each of its tokens."""
        return torch.repeat_interleave(statistic, self._tokens, dim=0, output_size=sum(self.lengths))


def smoothed(key: torch.Tensor, keys: Documents) -> torch.Tensor:
    """``[tokens, Hkv, D]`` minus its mean per document: softmax is unchanged, and the rest needs fewer bits."""
    return (key.float() - keys.spread(keys.mean(key))).to(key.dtype)
