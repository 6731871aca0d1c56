"""Encoded text on disk: made once, memory-mapped by every rank. No torch: the launcher runs this.

A corpus is a folder named by a hash of all that decides its content:
meta.json, train.bin and validation.bin (little-endian uint8 or uint16), tokenizer.json for a BPE.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minigpt.config import DataConfig, Source, Tokenizer
from minigpt.sources import generated_tokens, random_tokens, read_text, sha256_of
from minigpt.tokenizer import BPE_FILE, BPETokenizer, train_bpe, train_bpe_by_hand

FORMAT = 1  # raise it when the content of the files changes
SPLITS = ("train", "validation")
MADE_UP = {Source.generated: generated_tokens, Source.random: random_tokens}


@dataclass(frozen=True)
class Corpus:
    """What is known of an encoded text."""

    folder: Path
    sha256: str  # of the raw text, or of the made-up tokens
    tokenizer: str  # bytes | bpe | by_hand_bpe | numbers
    vocab_size: int
    dtype: str  # uint8 | uint16
    sizes: dict[str, int]  # tokens of each split
    digests: dict[str, str]  # SHA-256 of each split's file
    unigram_entropy: float  # nats a token of the training split: what a model without context gets
    bytes_per_token: float | None  # of the raw text

    def tokens(self, split: str) -> np.ndarray:
        """The ids of a split, memory-mapped."""
        return np.memmap(self.folder / f"{split}.bin", dtype=self.dtype, mode="r")

    def check_length(self, seq_len: int) -> None:
        """Each split must hold one sequence and its last target."""
        for split in SPLITS:
            if self.sizes[split] < seq_len + 1:
                raise ValueError(
                    f"seq_len={seq_len}: the {split} split has {self.sizes[split]} tokens, "
                    f"{seq_len + 1} are needed"
                )


def kind_of_tokens(config: DataConfig) -> str:
    """bytes | bpe | by_hand_bpe | numbers: what minigpt.tokenizer.make_tokenizer takes."""
    return "numbers" if config.source in MADE_UP else config.tokenizer.value


def check_vocabulary(corpus: Corpus, model_vocab_size: int) -> None:
    """Every id of the text must have a row in the model's embedding."""
    if corpus.vocab_size > model_vocab_size:
        raise ValueError(
            f"model.vocab_size={model_vocab_size}: smaller than the data's {corpus.vocab_size} ids"
        )


def prepare(config: DataConfig) -> Corpus:
    """Find the corpus in the cache, or make it. Raises ValueError with one line."""
    cache = Path(config.cache).expanduser()
    if config.source in MADE_UP:
        tokens = MADE_UP[config.source](config.tokens, config.vocab_size)
        raw = tokens.astype("<u2").tobytes()
    else:
        raw = read_text(config, cache)
    sha256 = sha256_of(raw)
    decides = (FORMAT, sha256, config.tokenizer, config.vocab_size, config.validation_fraction)
    key = hashlib.sha256(repr(decides).encode()).hexdigest()[:16]
    folder = cache / f"{config.source.value}-{key}"
    if folder.exists():
        return open_corpus(folder)
    splits, tokenizer_json = _encode(config, raw)
    _publish(folder, sha256, splits, tokenizer_json, config, len(raw))
    return open_corpus(folder)


def prepare_for(config: DataConfig, vocab_size: int, seq_len: int) -> Corpus:
    """The same, where a model of such a vocabulary can read sequences so long; else ValueError."""
    corpus = prepare(config)
    check_vocabulary(corpus, vocab_size)
    corpus.check_length(seq_len)
    return corpus


def open_corpus(folder: Path) -> Corpus:
    """Read a corpus and check that its files are whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        corpus = Corpus(folder=folder, **meta)
        whole = all(_digest(folder / f"{s}.bin") == corpus.digests[s] for s in SPLITS)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"data.cache: {folder} is damaged ({error}); remove it") from error
    if not whole:
        raise ValueError(f"data.cache: {folder} is damaged (checksum); remove it")
    return corpus


def _encode(config: DataConfig, raw: bytes) -> tuple[dict[str, np.ndarray], str | None]:
    """Ids of each split, the last `validation_fraction` of the text held out."""
    if config.source in MADE_UP:
        ids = np.frombuffer(raw, "<u2")
        cut = _cut(len(ids), config)
        return {"train": ids[:cut], "validation": ids[cut:]}, None
    cut = _cut(len(raw), config)
    parts = {"train": raw[:cut], "validation": raw[cut:]}
    if config.tokenizer == Tokenizer.bytes:
        return {split: np.frombuffer(part, "u1") for split, part in parts.items()}, None
    train = train_bpe if config.tokenizer == Tokenizer.bpe else train_bpe_by_hand
    trained = train(parts["train"].decode(errors="replace"), config.vocab_size)
    return {split: _bpe_ids(trained, part) for split, part in parts.items()}, trained


def _cut(length: int, config: DataConfig) -> int:
    return length - math.ceil(config.validation_fraction * length)


def _bpe_ids(tokenizer_json: str, part: bytes) -> np.ndarray:
    """Ids of a text, line by line: one piece of several MB would take the encoder minutes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / BPE_FILE
        path.write_text(tokenizer_json)
        tokenizer = BPETokenizer(path).tokenizer
    lines = part.decode(errors="replace").splitlines(keepends=True)
    encoded = tokenizer.encode_batch(lines, add_special_tokens=False)
    return np.fromiter((i for line in encoded for i in line.ids), dtype="<u2")


def _publish(
    folder: Path,
    sha256: str,
    splits: dict[str, np.ndarray],
    tokenizer_json: str | None,
    config: DataConfig,
    raw_bytes: int,
) -> None:
    """Write the files aside and rename the folder: a reader sees all of them or none.

    Two launches may do this at once; the second finds the name taken and drops its own.
    """
    dtype = "uint8" if config.vocab_size <= 256 else "uint16"
    part: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
        for split, ids in splits.items():
            (part / f"{split}.bin").write_bytes(
                ids.astype(f"<u{np.dtype(dtype).itemsize}").tobytes()
            )
        if tokenizer_json:
            (part / BPE_FILE).write_text(tokenizer_json)
        count = sum(map(len, splits.values()))
        corpus = Corpus(
            folder=part,
            sha256=sha256,
            tokenizer=kind_of_tokens(config),
            vocab_size=config.vocab_size,
            dtype=dtype,
            sizes={split: len(ids) for split, ids in splits.items()},
            digests={split: _digest(part / f"{split}.bin") for split in splits},
            unigram_entropy=_entropy(splits["train"]),
            bytes_per_token=None if config.source in MADE_UP else raw_bytes / count,
        )
        meta = {key: value for key, value in asdict(corpus).items() if key != "folder"}
        (part / "meta.json").write_text(json.dumps(meta, indent=1))
        os.rename(part, folder)
    except OSError as error:
        if not folder.exists():
            raise ValueError(f"data.cache={config.cache}: {error.strerror}") from error
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _entropy(ids: np.ndarray) -> float:
    """Entropy of the distribution of single ids, in nats."""
    counts = np.bincount(ids)
    share = counts[counts > 0] / max(1, counts.sum())
    return float(-(share * np.log(share)).sum())
