"""Text to ids and back: bytes, a byte-pair encoding trained here, or a given tokenizer.json.

Trained and given ones are read by Hugging Face's tokenizers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from minigpt.by_hand import bpe

BPE_FILE = "tokenizer.json"
WITH_FILE = ("bpe", "by_hand_bpe", "file")  # kinds that have it
TRAINER = 2  # raise it when the same text gives another tokenizer
NAMES = "bytes, bpe, by_hand_bpe, ids or a tokenizer.json file"


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


class FileTokenizer:
    """A tokenizer read from a tokenizer.json; one trained here gives any text back as it was."""

    def __init__(self, text: str) -> None:
        """`text` is the file's content. Raises ValueError where it describes no tokenizer."""
        from tokenizers import Tokenizer

        try:
            self.tokenizer: Any = Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(str(error).splitlines()[0]) from error
        # a file may ask for a longest text, and what lies behind it would be lost
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    @property
    def size(self) -> int:
        """The highest id and one."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def read_tokenizer(path: Path, key: str) -> tuple[FileTokenizer, str]:
    """A tokenizer.json and its content. Raises ValueError, one line that begins with `key`."""
    try:
        text = path.read_bytes().decode()
        return FileTokenizer(text), text
    except OSError as error:
        raise ValueError(f"{key}={path}: {error.strerror}; it takes {NAMES}") from error
    except ValueError as error:
        raise ValueError(
            f"{key}={path}: is no tokenizer.json that Hugging Face's tokenizers reads ({error})"
        ) from error


def tokenizer_digest(text: str) -> str:
    """The SHA-256 of a tokenizer.json, as sha256sum gives it."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a tokenizer file. Raises OSError."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def vocabulary_name(kind: str, digest: str | None) -> str | None:
    """Return what tells one vocabulary from another, None if nothing does.

    `digest` is that of the tokenizer.json, which kinds with a file have.
    """
    if kind in WITH_FILE:
        return digest
    return None if kind == "ids" else kind


def pre_tokenizer() -> Any:
    """GPT-2's pieces of text, at most bpe.LONGEST_PIECE characters of a kind each.

    Neither learning nor encoding is fast on longer ones: a text without spaces would be one piece.
    """
    from tokenizers import Regex, pre_tokenizers

    most = f"{{1,{bpe.LONGEST_PIECE}}}"
    pieces = (
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}{most}| ?\p{{N}}{most}| ?[^\s\p{{L}}\p{{N}}]{most}"
        rf"|\s{most}(?!\S)|\s{most}"
    )
    split = pre_tokenizers.Split(Regex(pieces), "isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_letters])


def train_bpe(lines: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE (Sennrich 2016) of at most `vocab_size` ids; returns its JSON.

    The trainer's memory grows with its longest piece, so that text is given line by line.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer.to_str()


def train_bpe_by_hand(lines: Iterable[str], vocab_size: int) -> str:
    """The same by minigpt/by_hand/bpe.py: its tokens and merges as the JSON that is read above."""
    from tokenizers import Tokenizer, decoders, models

    tokens, merges = bpe.train_bpe(lines, vocab_size)
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def make_tokenizer(kind: str, vocab_size: int, folder: Path) -> TextTokenizer:
    """The tokenizer of that kind; one with a file is read from `folder`, a corpus's or a run's."""
    if kind in WITH_FILE:
        return read_tokenizer(folder / BPE_FILE, "tokenizer")[0]
    return ByteTokenizer() if kind == "bytes" else NumberTokenizer(vocab_size)
