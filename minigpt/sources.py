"""Where text comes from, as chunks of bytes, or as made-up tokens. No torch.

Every error is a ValueError of one line that names the key, its value and what to do.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from minigpt.config import DataConfig, Source
from minigpt.reading import BETWEEN_DOCUMENTS, CHUNK, Raw, open_files

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
OPENWEBTEXT = "Skylion007/openwebtext"
DOWNLOAD_TIMEOUT_S = 30
BYTES_PER_TOKEN = 4  # how much English a byte-pair token covers, about


def open_source(config: DataConfig, cache: Path) -> Raw:
    """Find what a corpus is made from. `cache` keeps what was downloaded."""
    if config.source in MADE_UP:
        ids = MADE_UP[config.source](config.tokens, config.id_count or 0).astype("<u2").tobytes()
        return Raw(lambda: iter([ids]), len(ids), are_ids=True)
    if config.source == Source.stdlib:
        text = standard_library()
        return Raw(lambda: iter([text]), len(text))
    if config.source == Source.text:
        return open_files(config)
    if config.source == Source.shakespeare:
        path = cache / "shakespeare.txt"
        fetched_once("shakespeare", path, SHAKESPEARE_SHA256, lambda: shakespeare(path))
    else:
        path = cache / f"openwebtext-{config.tokens}.txt"
        fetched_once("openwebtext", path, config.sha256, lambda: openwebtext(config))
    return Raw(lambda: chunks_of(path), path.stat().st_size)


def chunks_of(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def sha256_of(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def standard_library() -> bytes:
    """The running interpreter's top-level modules, sorted by name: real text on every machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(path for path in folder.glob("*.py") if path.is_file())
    text = b"".join(path.read_bytes() for path in modules)
    if not text:
        raise ValueError(f"data=stdlib: {folder} holds no source; use data=text data.path=FILE")
    return text


def fetched_once(
    source: str, path: Path, sha256: str | None, fetch: Callable[[], Iterable[bytes]]
) -> None:
    """Keep what `fetch` brings at `path`, and never fetch it again.

    Where nobody knows the right checksum, the one of the first download stands in a file beside it.
    """
    beside = path.with_name(path.name + ".sha256")
    if path.exists():
        if sha256 is None and beside.exists():
            sha256 = beside.read_text().strip()
        found = sha256_of(chunks_of(path))
        _check_sha256(source, found, sha256, f"{path}; remove it")
        return

    def check(found: str) -> None:
        _check_sha256(source, found, sha256, "what was downloaded")
        write_whole(beside, [f"{found}\n".encode()])

    write_whole(path, fetch(), check)


def _check_sha256(source: str, found: str, sha256: str | None, where: str) -> None:
    if sha256 is not None and found != sha256:
        raise ValueError(f"data={source}: SHA-256 {found} is not {sha256}: damaged is {where}")


def shakespeare(path: Path) -> list[bytes]:
    """Tiny Shakespeare (Karpathy 2015), 1.1 MB of text in the public domain."""
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT_S) as answer:
            return [answer.read()]
    except OSError as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"data=shakespeare: {SHAKESPEARE_URL} could not be fetched ({reason}); put the file "
            f"at {path}, or use data=stdlib, which needs no network"
        ) from error


def openwebtext(config: DataConfig) -> Iterator[bytes]:
    """The first documents of OpenWebText, enough for `data.tokens`, streamed from its hub.

    Its SHA-256 stands in the ledger; data.sha256 holds a later run to it.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "data=openwebtext: needs the package `datasets` (pip install datasets) and a network; "
            "data=stdlib needs neither"
        ) from None
    wanted, size = config.tokens * BYTES_PER_TOKEN, 0
    try:
        for row in datasets.load_dataset(OPENWEBTEXT, split="train", streaming=True):
            document = row["text"].encode() + BETWEEN_DOCUMENTS
            yield document
            size += len(document)
            if size >= wanted:
                break
    except Exception as error:  # the client raises many kinds when there is no network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data=openwebtext: {OPENWEBTEXT} could not be fetched ({reason}); "
            f"data=stdlib needs no network"
        ) from error


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """A well-mixed 64-bit hash of each number: integers only, so the same on every machine.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def random_tokens(count: int, vocab_size: int) -> np.ndarray:
    """Uniform ids: nothing to learn, for benchmarks."""
    return (splitmix64(np.arange(count)) % np.uint64(vocab_size)).astype(np.int64)


def generated_tokens(count: int, vocab_size: int) -> np.ndarray:
    """Made-up text that can be learned: phrases of fixed tokens, in random order, some corrupted.

    A model that knows a phrase's beginning knows the rest, so the loss falls far below the
    unigram entropy; one token in sixteen is noise, so it never reaches zero.
    """
    phrase_length, phrases = 16, 64
    book = random_tokens(phrases * phrase_length, vocab_size).reshape(phrases, phrase_length)
    order = splitmix64(np.arange(count // phrase_length + 1) + 2**40) % np.uint64(phrases)
    tokens = book[order.astype(np.int64)].reshape(-1)[:count].copy()
    hashes = splitmix64(np.arange(count) + 2**41)
    noisy = hashes % np.uint64(16) == 0
    tokens[noisy] = (hashes[noisy] >> np.uint64(32)).astype(np.int64) % vocab_size
    return tokens


MADE_UP = {Source.generated: generated_tokens, Source.random: random_tokens}


def write_whole(
    path: Path, chunks: Iterable[bytes], check: Callable[[str], None] = lambda sha256: None
) -> None:
    """Write a file whole or not at all; `check` may refuse its SHA-256.

    Raises ValueError where the cache cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent)
    except OSError as error:
        raise ValueError(f"data.cache={path.parent}: {error.strerror}") from error
    digest = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        check(digest.hexdigest())
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"data.cache={path.parent}: {error.strerror}") from error
    finally:
        Path(part).unlink(missing_ok=True)
