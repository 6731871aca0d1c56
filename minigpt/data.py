"""Batches as a pure function of (seed, step): the same global batch for every layout.

Shapes: B sequences of this call, T tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minigpt.corpus import Corpus
from minigpt.model import IGNORE
from minigpt.sources import splitmix64

RAGGED_SALT = 2**62  # keeps the lengths of sequences apart from their places
EMPTY_SHARE = 4  # of the ragged sequences, every fourth has no valid target at all


@dataclass(frozen=True)
class Batches:
    """Windows of T + 1 tokens at hashed places of the training split.

    A sequence's place depends on its number since the beginning of training and on the seed, and
    on nothing else: neither on the batch size nor on who reads it.
    """

    corpus: Corpus
    seq_len: int
    global_batch_size: int
    seed: int
    ragged: bool = False  # targets behind a hashed length are ignored

    def rows(self, step: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows start ... start + count of global batch `step`: inputs and targets, (B, T) int64."""
        assert start >= 0 and start + count <= self.global_batch_size
        numbers = np.arange(start, start + count) + step * self.global_batch_size
        hashes = splitmix64(splitmix64(np.array([self.seed])) ^ numbers.astype(np.uint64))
        tokens = self._train
        places = hashes % np.uint64(len(tokens) - self.seq_len)
        inputs, targets = self._windows(tokens, places.astype(np.int64))
        if self.ragged:
            targets[self._behind_end(hashes)] = IGNORE
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def validation_rows(self, index: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        """The same for batch `index` of the held-out windows, which lie end to end (and wrap)."""
        tokens = self._validation
        windows = (len(tokens) - 1) // self.seq_len
        numbers = np.arange(start, start + count) + index * self.global_batch_size
        # a stride prime to the number of windows spreads any few of them over the whole split
        stride = next(
            s for s in range(windows * 5 // 8 + 1, 2 * windows + 2) if np.gcd(s, windows) == 1
        )
        inputs, targets = self._windows(tokens, numbers * stride % windows * self.seq_len)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    @cached_property
    def _train(self) -> np.ndarray:
        return self.corpus.tokens("train")

    @cached_property
    def _validation(self) -> np.ndarray:
        return self.corpus.tokens("validation")

    def _windows(self, tokens: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        window = tokens[places[:, None] + np.arange(self.seq_len + 1)].astype(np.int64)
        return window[:, :-1].copy(), window[:, 1:].copy()  # copies: the targets may be masked

    def _behind_end(self, hashes: np.ndarray) -> np.ndarray:
        """(B, T), true where a ragged sequence has ended."""
        again = splitmix64(hashes ^ np.uint64(RAGGED_SALT))
        lengths = (again % np.uint64(self.seq_len)).astype(np.int64) + 1
        lengths[(again >> np.uint64(32)) % np.uint64(EMPTY_SHARE) == 0] = 0
        return np.arange(self.seq_len)[None] >= lengths[:, None]
