"""Text to ids and back: bytes, or a byte-pair encoding trained here (huggingface tokenizers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from minigpt.by_hand import bpe

BPE_FILE = "tokenizer.json"
TRAINED = ("bpe", "by_hand_bpe")  # kinds that leave this file


class TextTokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class ByteTokenizer:
    """One id a byte of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class NumberTokenizer:
    """Made-up tokens stand for nothing: they are shown as numbers."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """A prompt has no meaning here, so that any text gives ids within the vocabulary."""
        return [byte % self.vocab_size for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class BPETokenizer:
    """Byte-level byte-pair encoding: any text comes back as it was."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.tokenizer: Any = Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def train_bpe(text: str, vocab_size: int) -> str:
    """Train a byte-level BPE (Sennrich 2016) of at most `vocab_size` ids; returns its JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # line by line: the trainer's memory grows with its longest piece
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer.to_str()


def train_bpe_by_hand(text: str, vocab_size: int) -> str:
    """The same by minigpt/by_hand/bpe.py: its tokens and merges as the JSON that is read above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = bpe.train_bpe(text, vocab_size)
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def make_tokenizer(kind: str, vocab_size: int, folder: Path) -> TextTokenizer:
    """The tokenizer of that kind; a BPE is read from `folder`, a corpus's or a run's."""
    if kind in TRAINED:
        return BPETokenizer(folder / BPE_FILE)
    return ByteTokenizer() if kind == "bytes" else NumberTokenizer(vocab_size)
