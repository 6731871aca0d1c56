"""Encoded text on disk: made once, memory-mapped by every rank. No torch: the launcher runs this.

A corpus is a folder named by a hash of all that decides its content:
meta.json, train.bin and validation.bin (little-endian uint8, 16 or 32), and tokenizer.json if its
ids are a tokenizer's. The text is read twice, the second time only if it is not in the cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minigpt.config import DataConfig, Tokenizer, require
from minigpt.encoding import FileArray, encode, learn
from minigpt.progress import Progress
from minigpt.reading import CHUNK, Raw
from minigpt.sources import MADE_UP, chunks_of, open_source, sha256_of
from minigpt.tokenizer import (
    BPE_FILE,
    TRAINER,
    WITH_FILE,
    FileTokenizer,
    read_tokenizer,
    tokenizer_digest,
    vocabulary_name,
)

FORMAT = 1  # raise it when the content of the files changes
SPLITS = ("train", "validation")
TOKENIZER = "tokenizer"  # among the digests: that of tokenizer.json


@dataclass(frozen=True)
class Corpus:
    """What is known of an encoded text."""

    folder: Path
    sha256: str  # of the raw text, or of the made-up tokens
    tokenizer: str  # bytes | bpe | by_hand_bpe | file | ids | numbers
    vocab_size: int
    dtype: str  # uint8 | uint16 | uint32
    sizes: dict[str, int]  # tokens of each split
    digests: dict[str, str]  # SHA-256 of each split's file, and of tokenizer.json
    unigram_entropy: float  # nats a token of the training split: what a model without context gets
    bytes_per_token: float | None  # of the raw text

    @property
    def vocabulary(self) -> str | None:
        """Return the name of its vocabulary; None for ids that came without a tokenizer."""
        return vocabulary_name(self.tokenizer, self.digests.get(TOKENIZER))

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
    """bytes | bpe | by_hand_bpe | file | ids | numbers: what make_tokenizer takes."""
    return "numbers" if config.source in MADE_UP else config.kind.value


def check_vocabulary(size: int, model_vocab_size: int) -> None:
    """Every id of the text must have a row in the model's embedding."""
    require(
        size <= model_vocab_size,
        f"model.vocab_size={model_vocab_size}: smaller than the data's {size} ids",
    )


@dataclass(frozen=True)
class Vocabulary:
    """The ids that a text becomes, as far as they are known before it is read."""

    kind: str
    size: int
    given: tuple[FileTokenizer, str] | None = None  # of data.tokenizer=FILE, with its content

    @staticmethod
    def of(config: DataConfig) -> Vocabulary:
        """Read the tokenizer.json that is given. Raises ValueError, one line."""
        kind = kind_of_tokens(config)
        if config.kind != Tokenizer.file:
            assert config.id_count is not None
            return Vocabulary(kind, config.id_count)
        given = read_tokenizer(Path(config.tokenizer).expanduser(), "data.tokenizer")
        size = given[0].size
        wanted = config.vocab_size or size
        require(
            size <= wanted,
            f"data.vocab_size={wanted}: data.tokenizer={config.tokenizer} has {size} ids",
        )
        return Vocabulary(kind, wanted, given)

    @property
    def dtype(self) -> str:
        return "uint8" if self.size <= 2**8 else "uint16" if self.size <= 2**16 else "uint32"


def prepare(config: DataConfig) -> Corpus:
    """Find the corpus in the cache, or make it. Raises ValueError with one line."""
    return _prepare(config, Vocabulary.of(config))


def prepare_for(config: DataConfig, vocab_size: int, seq_len: int) -> Corpus:
    """The same, where a model of such a vocabulary can read sequences so long; else ValueError."""
    vocabulary = Vocabulary.of(config)
    check_vocabulary(vocabulary.size, vocab_size)
    corpus = _prepare(config, vocabulary)
    corpus.check_length(seq_len)
    return corpus


def _prepare(config: DataConfig, vocabulary: Vocabulary) -> Corpus:
    cache = Path(config.cache).expanduser()
    raw = open_source(config, cache)
    sha256 = _sha256(config, raw)
    require(
        config.sha256 in (None, sha256),
        f"data.sha256={config.sha256}: the text of data={config.source.value} has {sha256}",
    )
    folder = cache / f"{config.source.value}-{_key(config, vocabulary, sha256)}"
    if not folder.exists():
        _Maker(config, raw, sha256, vocabulary).publish(folder)
    return open_corpus(folder)


def _sha256(config: DataConfig, raw: Raw) -> str:
    with Progress(f"data={config.source.value}: reading", raw.size) as progress:
        return sha256_of(_counted(raw.chunks(), progress))


def _counted(chunks: Iterator[bytes], progress: Progress) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        progress.done += len(chunk)


def _key(config: DataConfig, vocabulary: Vocabulary, sha256: str) -> str:
    """A hash of all that decides the content of a corpus."""
    decides: tuple = (FORMAT, sha256, config.kind, vocabulary.size, config.validation_fraction)
    if vocabulary.given:
        decides += (tokenizer_digest(vocabulary.given[1]),)
    elif vocabulary.kind in WITH_FILE:
        decides += (TRAINER, config.bpe_sample)
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:16]


def open_corpus(folder: Path) -> Corpus:
    """Read a corpus and check that its files are whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        corpus = Corpus(folder=folder, **meta)
        files = {folder / f"{split}.bin": corpus.digests[split] for split in SPLITS}
        if corpus.tokenizer in WITH_FILE:
            files[folder / BPE_FILE] = corpus.digests[TOKENIZER]
        whole = all(_digest(path) == digest for path, digest in files.items())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"data.cache: {folder} is damaged ({error}); remove it") from error
    if not whole:
        raise ValueError(f"data.cache: {folder} is damaged (checksum); remove it")
    return corpus


class _Split:
    """The file of one split while it is written: its ids, how many, how often each, its digest."""

    def __init__(self, path: Path, vocabulary: Vocabulary) -> None:
        self.file = open(path, "wb")  # noqa: SIM115
        self.vocabulary = vocabulary
        self.size, self.digest = 0, hashlib.sha256()
        self.counts = np.zeros(vocabulary.size, dtype=np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Append ids. Raises ValueError where one lies beyond the vocabulary."""
        highest, size = int(ids.max(initial=0)), self.vocabulary.size
        require(highest < size, f"data.vocab_size={size}: the data holds the id {highest}")
        content = ids.astype(np.dtype(self.vocabulary.dtype).newbyteorder("<")).tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.size += len(ids)
        self.counts += np.bincount(ids, minlength=size)


class _Maker:
    """Makes the files of one corpus."""

    def __init__(self, config: DataConfig, raw: Raw, sha256: str, vocabulary: Vocabulary) -> None:
        self.config, self.raw, self.sha256, self.vocabulary = config, raw, sha256, vocabulary

    def publish(self, folder: Path) -> None:
        """Write the files aside and rename the folder: a reader sees all of them or none.

        Two launches may do this at once; the second finds the name taken and drops its own.
        """
        part: Path | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
            corpus = self._write(part)
            meta = {key: value for key, value in asdict(corpus).items() if key != "folder"}
            (part / "meta.json").write_text(json.dumps(meta, indent=1))
            os.rename(part, folder)
        except OSError as error:
            if not folder.exists():
                raise ValueError(f"data.cache={self.config.cache}: {error.strerror}") from error
        finally:
            if part:
                shutil.rmtree(part, ignore_errors=True)

    def _write(self, part: Path) -> Corpus:
        """Ids of each split, the last `validation_fraction` of the text held out."""
        config, vocabulary = self.config, self.vocabulary
        data = self._copied(part / "raw")
        cut = len(data) - math.ceil(config.validation_fraction * len(data))
        tokenizer_json = vocabulary.given[1] if vocabulary.given else None
        if vocabulary.kind in WITH_FILE and not tokenizer_json and not self.raw.are_ids:
            tokenizer_json = learn(vocabulary.kind, data, cut, config.bpe_sample, vocabulary.size)
        digests = {}
        if tokenizer_json:
            (part / BPE_FILE).write_bytes(tokenizer_json.encode())
            digests[TOKENIZER] = tokenizer_digest(tokenizer_json)
        splits = {}
        with Progress(f"data={config.source.value}: encoding", data.nbytes) as progress:
            for split, start, end in (("train", 0, cut), ("validation", cut, len(data))):
                splits[split] = _Split(part / f"{split}.bin", vocabulary)
                with splits[split].file:
                    for ids in self._ids(data, start, end, tokenizer_json, progress):
                        splits[split].add(ids)
                digests[split] = splits[split].digest.hexdigest()
        (part / "raw").unlink()
        count = sum(split.size for split in splits.values())
        return Corpus(
            folder=part,
            sha256=self.sha256,
            tokenizer=vocabulary.kind,
            vocab_size=vocabulary.size,
            dtype=vocabulary.dtype,
            sizes={name: split.size for name, split in splits.items()},
            digests=digests,
            unigram_entropy=_entropy(splits["train"].counts),
            bytes_per_token=None if self.raw.are_ids else data.nbytes / count,
        )

    def _copied(self, path: Path) -> FileArray:
        """The raw text or ids as one file."""
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for chunk in self.raw.chunks():
                file.write(chunk)
                digest.update(chunk)
            size = file.tell()
        require(digest.hexdigest() == self.sha256, "data.path: it changed while it was read")
        name = self.config.path or self.config.source.value
        require(size > 0, f"data.path={name}: holds no text")
        return FileArray(path, "<u2" if self.raw.are_ids else "u1")

    def _ids(
        self,
        data: FileArray,
        start: int,
        end: int,
        tokenizer_json: str | None,
        progress: Progress,
    ) -> Iterator[np.ndarray]:
        if tokenizer_json and not self.raw.are_ids:
            yield from encode(FileTokenizer(tokenizer_json), data, start, end, progress)
            return
        for at in range(start, end, CHUNK):
            ids = data[at : min(at + CHUNK, end)]
            yield ids
            progress.done += ids.nbytes


def _digest(path: Path) -> str:
    return sha256_of(chunks_of(path))


def _entropy(counts: np.ndarray) -> float:
    """Entropy of the distribution of single ids, in nats."""
    share = counts[counts > 0] / max(1, counts.sum())
    return float(-(share * np.log(share)).sum())
