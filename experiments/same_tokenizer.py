"""Compares the tokenizer that weights were trained with to the one whose ids they are to read.

Ids of one vocabulary mean nothing in another, and every id fits in a table that is large enough.
So whatever holds weights also names its tokenizer: `bytes`, `numbers` (made-up data), or the
SHA-256 of a tokenizer.json, which the run's folder keeps. No torch: the launcher reads this.
"""

from __future__ import annotations

from pathlib import Path

from minigpt.config import DataConfig, require
from minigpt.corpus import kind_of_tokens
from minigpt.tokenizer import BPE_FILE, file_digest, vocabulary_name

REMEDIES = {
    "bytes": "data.tokenizer=bytes would do",
    "numbers": "data=generated or data=random would do",
}


def recorded(run: Path, data: DataConfig) -> str | None:
    """Return the tokenizer of a run by its configuration and the file in its folder."""
    path = run / BPE_FILE
    return vocabulary_name(kind_of_tokens(data), file_digest(path) if path.is_file() else None)


def check_tokenizer(
    said: str, theirs: str | None, ours: str | None, run: Path | None = None
) -> list[str]:
    """Return the warning, one line or none, that two tokenizers could not be compared.

    `theirs` is that of the weights, whose run's folder is `run` if it is known; `ours` is that of
    the data. Raises ValueError, one line that begins with `said`, if they differ.
    """
    if not isinstance(theirs, str) or ours is None:
        of = "it was trained with" if ours else "the data's ids are of"
        return [f"{said}: does not say which tokenizer {of}; unverified: data.tokenizer"]
    kept = run and (run / BPE_FILE).is_file() and file_digest(run / BPE_FILE) == theirs
    file = run / BPE_FILE if run and kept else "FILE with that tokenizer.json, which its run keeps,"
    remedy = REMEDIES.get(theirs, f"data.tokenizer={file} would do")
    require(
        theirs == ours,
        f"{said}: was trained with {_named(theirs)}, and the data has {_named(ours)}; {remedy}",
    )
    return []


def _named(tokenizer: str) -> str:
    if tokenizer in REMEDIES:
        return "made-up numbers" if tokenizer == "numbers" else "data.tokenizer=bytes"
    return f"the tokenizer.json of SHA-256 {tokenizer[:12]}"
