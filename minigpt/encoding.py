"""Text of any length to ids, block by block, and the part of it that a tokenizer is learnt from.

`data` is UTF-8 as an array of bytes or a file of them: no more than a few blocks of a file are in
memory at a time. No torch: the launcher runs this.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from minigpt.by_hand.bpe import LONGEST_PIECE
from minigpt.progress import Progress, say
from minigpt.tokenizer import FileTokenizer, train_bpe, train_bpe_by_hand

BLOCK = 2**16  # bytes that are decoded at a time
LONGEST_BLOCK = 2**18  # characters after which a text without a place to split is split anywhere
AT_ONCE = 2**20  # characters that are encoded in parallel
FEW_SPACES = 100  # one in so many characters: hardly any words


class FileArray:
    """The numbers of a file, read slice by slice. Pages of a memory map would stay resident."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype, self.nbytes = path, np.dtype(dtype), path.stat().st_size

    def __len__(self) -> int:
        return self.nbytes // self.dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        at = start * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, max(0, stop - start), offset=at)


Data = np.ndarray | FileArray


def blocks(data: Data, start: int, end: int) -> Iterator[str]:
    """Yield the text of data[start:end], split behind a new line that has text on both sides.

    The pieces of GPT-2 and of tiktoken's encodings end there, and see no further, so that the ids
    are those of the whole text. A character that an end cuts becomes the replacement character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    for at in range(start, end, BLOCK):
        stop = min(at + BLOCK, end)
        text += decoder.decode(data[at:stop].tobytes(), final=stop == end)
        if cut := _break(text):
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def _break(text: str) -> int:
    """The last place to split; 0 where there is none yet."""
    at = len(text) - 1
    while (at := text.rfind("\n", 1, at)) >= 0:
        if not (text[at - 1].isspace() or text[at + 1].isspace()):
            return at + 1
    if len(text) < LONGEST_BLOCK:
        return 0
    return text.rfind("\n") + 1 or max(0, text.rfind(" ")) or len(text)


def encode(
    tokenizer: FileTokenizer, data: Data, start: int, end: int, progress: Progress
) -> Iterator[np.ndarray]:
    """Yield the ids of data[start:end], many blocks in an array."""
    waiting: list[str] = []
    for text in chain(blocks(data, start, end), [None]):
        if text is not None:
            waiting.append(text)
        if text is None or sum(map(len, waiting)) >= AT_ONCE:
            ids = chain.from_iterable(tokenizer.encode_all(waiting))
            yield np.fromiter(ids, dtype="<u4")
            progress.done += sum(len(one.encode()) for one in waiting)
            waiting = []


def sample(data: Data, end: int, most: int) -> Iterator[str]:
    """Yield the lines of data[:end], or of windows of `most` bytes in all, evenly spread over it.

    The same text gives the same windows.
    """
    if end <= most:
        windows = [(0, end)]
    else:
        size = min(BLOCK, most)
        count = most // size
        step = (end - size) / max(1, count - 1)
        windows = [(int(i * step), int(i * step) + size) for i in range(count)]
    for start, stop in windows:
        for text in blocks(data, start, stop):
            yield from text.splitlines(keepends=True)


def learn(kind: str, data: Data, end: int, most: int, vocab_size: int) -> str:
    """Train a tokenizer on a sample of data[:end]; returns its tokenizer.json."""
    lines = list(sample(data, end, most))
    characters = sum(map(len, lines))
    spaces = sum(len(line) - len("".join(line.split())) for line in lines)
    if spaces * FEW_SPACES < characters:
        rate = f"one space in {characters // spaces:,} characters" if spaces else "no spaces"
        say(
            f"data.tokenizer={kind}: the text has {rate}; it is learnt and encoded in pieces of at "
            f"most {LONGEST_PIECE} characters"
        )
    size = min(end, most)
    of = f" of {end / 1e6:,.1f}" if end > most else ""
    what = f"data.tokenizer={kind}: learning {vocab_size:,} ids from {size / 1e6:,.1f}{of} MB"
    with Progress(what):
        return (train_bpe if kind == "bpe" else train_bpe_by_hand)(lines, vocab_size)
