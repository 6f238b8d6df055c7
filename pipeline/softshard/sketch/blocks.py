"""Rows of logits, divided into blocks of tokens: one pass over all blocks, then a second look at a few of them.

Reads [rows, at least V] logits on any device and in any floating type. Yields chunks of the dense distribution while
they are in the cache, and later the probabilities of single blocks. No second copy of [rows, V] is made. Logits beyond
the vocabulary are padding and are ignored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["BLOCK", "BlockedRows", "block_sums"]

BLOCK = 64
"""Tokens per block. Running sums are taken over blocks; only blocks that hold an entry are summed token by token."""

_CHUNK_ON_CPU = 8 * 49_152
"""Elements per chunk: few enough for the caches, enough to make the fixed cost of a call small."""
_CHUNK_ON_GPU = 2**24


class BlockedRows:
    """Rows of logits: first one pass over all of them (`chunks`), then single blocks (`probabilities`).

    Args:
        logits: [rows, at least vocab_size].
        vocab_size: V.
        temperature: logits are divided by it.
    """

    def __init__(self, logits: Tensor, *, vocab_size: int, temperature: float) -> None:
        self._logits = logits if logits.stride(1) == 1 else logits.contiguous()
        self._temperature = temperature
        self.num_rows, self.vocab_size = len(logits), vocab_size
        self.device = logits.device
        whole, rest = divmod(vocab_size, BLOCK)
        self._blocks = _in_blocks(self._logits, whole)
        self._rest = None
        if rest:
            self._rest = torch.full((self.num_rows, BLOCK), -torch.inf, dtype=logits.dtype, device=logits.device)
            self._rest[:, :rest] = self._logits[:, whole * BLOCK : vocab_size]
        self.num_blocks = whole + (rest > 0)

    @property
    def chunk_rows(self) -> int:
        """Rows per chunk; the last chunk may have fewer."""
        elements = _CHUNK_ON_CPU if self.device.type == "cpu" else _CHUNK_ON_GPU
        return max(1, min(self.num_rows, elements // self.vocab_size))

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scaled logits, probabilities and scratch memory of chunk_rows rows, each float32 [n, V].

        The next chunk overwrites all three.

        A row whose logits are invalid (NaN, +inf, or nothing but -inf) has NaN probabilities.
        """
        buffers = _buffers(self.chunk_rows, self.vocab_size, self.device)
        for logits in torch.split(self._logits[:, : self.vocab_size], self.chunk_rows):
            scores = self._scaled(logits)
            probabilities, scratch = buffers[:, : len(logits)]
            yield scores, torch.softmax(scores, 1, out=probabilities), scratch

    def scores(self, rows: slice | Tensor) -> Tensor:
        """[n, V] float32 logits of some rows, divided by the temperature."""
        return self._scaled(self._logits[rows, : self.vocab_size])

    def token_scores(self, ids: Tensor) -> Tensor:
        """[rows] float32 scaled logits of one token per row."""
        return self._scaled(self._logits.gather(1, ids[:, None])[:, 0])

    def probabilities(self, rows: Tensor, blocks: Tensor, log_sums: Tensor) -> Tensor:
        """[n, BLOCK] float32 probabilities of n blocks; 0 beyond the vocabulary.

        Args:
            rows: [n] the row of each block.
            blocks: [n] the number of each block within its row.
            log_sums: [rows] log-sum-exp of the scaled logits.
        """
        if self._rest is None:
            found = self._blocks[rows, blocks]
        else:
            last = self._blocks.shape[1]
            found = self._rest[rows] if last == 0 else self._blocks[rows, blocks.clamp(max=last - 1)]
            found[blocks == last] = self._rest[rows[blocks == last]]
        return self._scaled(found).sub_(log_sums[rows, None]).exp_()

    def _scaled(self, logits: Tensor) -> Tensor:
        scores = logits.float()
        return scores if self._temperature == 1 else scores / self._temperature


_kept = threading.local()


def _buffers(num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """[2, num_rows, V] float32, kept between calls of one thread: fresh pages would take an eighth of the time."""
    found: Tensor | None = getattr(_kept, "buffers", None)
    if found is None or found.shape[1] < num_rows or found.shape[2] != vocab_size or found.device != device:
        with torch.inference_mode(False):
            found = _kept.buffers = torch.empty((2, num_rows, vocab_size), device=device)
    return found


def _in_blocks(rows: Tensor, num_blocks: int) -> Tensor:
    """[rows, num_blocks, BLOCK] view of the first blocks of each row; the rows may be padded."""
    return torch.as_strided(rows, (len(rows), num_blocks, BLOCK), (rows.stride(0), BLOCK, 1), rows.storage_offset())


def block_sums(probabilities: Tensor, *, out: Tensor) -> None:
    """Write the sum of each block of [rows, V] probabilities into `out`, [rows, blocks]; float32, summed pairwise."""
    whole = probabilities.shape[1] // BLOCK
    if whole:
        torch.sum(_in_blocks(probabilities, whole), -1, out=out[:, :whole])
    if whole < out.shape[1]:
        torch.sum(probabilities[:, whole * BLOCK :], -1, out=out[:, whole])
