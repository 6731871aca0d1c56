"""Text of the user's own files as chunks of UTF-8, or 16-bit ids, without holding any file whole.

Each function can be called again and reads the files anew. Every error is a ValueError of one line
that names the key, the file and what to do. No torch: the launcher runs this.
"""

from __future__ import annotations

import codecs
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.config import DataConfig, Tokenizer
from minigpt.formats import DAMAGED, LONGEST_LINE, Content, not_utf8, recognise

CHUNK = 2**20  # bytes that are read at a time
BETWEEN_DOCUMENTS = b"\n\n"  # after each line of JSON and each row of parquet
PARQUET_ROWS = 256  # rows that are decoded at a time
AS_IT_IS = "data.text_field=null reads the lines as they are"


@dataclass(frozen=True)
class File:
    """One file, what it holds, and which field of it is text."""

    path: Path
    content: Content
    field: str | None  # data.text_field

    def refuse(self, reason: str) -> ValueError:
        return ValueError(f"data.path={self.path}: {reason}")

    def chunks(self) -> Iterator[bytes]:
        """Yield UTF-8 text, or the bytes of 16-bit ids. Raises ValueError with one line."""
        try:
            if self.content.kind == "numbers":
                yield from self._bytes()
            elif self.content.kind == "parquet":
                yield from self._rows()
            elif self.content.kind == "json_lines" and self.field is not None:
                yield from self._documents()
            else:
                yield from self._text()
        except DAMAGED as error:
            raise self.refuse(f"is damaged or cut short: {error}") from error
        except OSError as error:
            raise self.refuse(f"cannot be read: {_first_line(error)}") from error

    def _bytes(self) -> Iterator[bytes]:
        with self.content.open(self.path) as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def _text(self) -> Iterator[bytes]:
        """UTF-8 as it is, once it has been checked; other encodings converted.

        A character of UTF-8 that the end of the file cuts stays as it is: `head -c` leaves such.
        """
        encoding, offset = self.content.encoding, self.content.mark
        decoder = codecs.getincrementaldecoder(encoding)()
        for chunk in self._bytes():
            kept = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
            try:
                text = decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise self.refuse(self._bad(error, offset - kept)) from error
            yield chunk if encoding == "utf-8" else text.encode()
            offset += len(chunk)
        if encoding != "utf-8" and decoder.getstate()[0]:
            raise self.refuse(f"is cut short: its last character of {encoding} is not whole")

    def _bad(self, error: UnicodeDecodeError, start: int) -> str:
        at = start + error.start
        if self.content.encoding == "utf-8":
            return not_utf8(self.path, error.object[error.start], at)
        return f"is not {self.content.encoding} all through: {error.reason} at byte {at:,}"

    def _lines(self) -> Iterator[bytes]:
        """The lines of the text, without their ends."""
        left: list[bytes] = []
        for chunk in self._text():
            head, *rest = chunk.split(b"\n")
            left.append(head)
            for line in rest:
                yield b"".join(left)
                left = [line]
            if sum(map(len, left)) > 16 * LONGEST_LINE:
                raise self.refuse(f"has a line of more than 1 GiB; {AS_IT_IS}")
        yield b"".join(left)

    def _documents(self) -> Iterator[bytes]:
        """The text field of each JSON object, many in a chunk."""
        made, size = [], 0
        for number, line in enumerate(self._lines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self.refuse(f"line {number:,} is not JSON; {AS_IT_IS}") from error
            text = self._field_of(record, f"line {number:,}")
            if text:
                made.append(text.encode("utf-8", "replace") + BETWEEN_DOCUMENTS)
                size += len(made[-1])
            if size >= CHUNK:
                yield b"".join(made)
                made, size = [], 0
        yield b"".join(made)

    def _field_of(self, record: Any, where: str) -> str | None:
        names = record.keys() if isinstance(record, dict) else ()
        if self.field not in names:
            raise self.refuse(
                f"{where} has no field {self.field!r}; data.text_field=NAME names another"
                + (f": it has {', '.join(map(str, list(names)[:8]))}" if names else "")
            )
        text = record[self.field]
        if text is not None and not isinstance(text, str):
            raise self.refuse(
                f"data.text_field={self.field}: {where} has a {type(text).__name__} there, not text"
            )
        return text

    def _rows(self) -> Iterator[bytes]:
        """The text column of a parquet file. A null is a document without text."""
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise self.refuse(
                "is a parquet file, which needs the package pyarrow: pip install pyarrow, into "
                ".venv where ./launch.sh made one"
            ) from None
        try:
            with parquet.ParquetFile(self.path, buffer_size=CHUNK, pre_buffer=False) as table:
                self._check_column(table.schema_arrow)
                batches = table.iter_batches(
                    batch_size=PARQUET_ROWS, columns=[self.field], use_threads=False
                )
                for batch in batches:
                    texts = (text.encode() for text in batch.column(0).to_pylist() if text)
                    yield b"".join(text + BETWEEN_DOCUMENTS for text in texts)
        except (ArrowException, UnicodeDecodeError) as error:
            raise self.refuse(f"is damaged: {str(error).splitlines()[0]}") from error

    def _check_column(self, schema: Any) -> None:
        names = [f.name for f in schema if str(f.type) in ("string", "large_string")]
        if self.field not in names:
            raise self.refuse(
                f"data.text_field={self.field}: no column of text has that name; "
                f"there {'is' if len(names) == 1 else 'are'} {', '.join(names[:8]) or 'none'}"
            )


@dataclass(frozen=True)
class Raw:
    """The source of a corpus; `chunks()` reads it anew each time it is called."""

    chunks: Callable[[], Iterator[bytes]]  # UTF-8, or 16-bit ids
    size: int | None  # bytes of it, where they are known before it is read
    are_ids: bool = False


def open_files(config: DataConfig) -> Raw:
    """Recognise the files of data=text, and refuse what cannot be trained on. Reads little."""
    files = [File(path, _content(path), config.text_field) for path in _paths(config.path or "")]
    for file in files:
        _check(file, config)
    ids = [file for file in files if file.content.kind == "numbers"]
    if ids and len(ids) < len(files):
        raise ids[0].refuse("holds binary data, and other files of data.path hold text")
    plain = all(f.content.kind in ("text", "numbers") and not f.content.unpack for f in files)
    size = sum(file.path.stat().st_size for file in files) if plain else None
    return Raw(lambda: _joined(files), size, bool(ids))


def _joined(files: list[File]) -> Iterator[bytes]:
    """The chunks of all files; a text that another follows ends with a new line."""
    last = b""
    for file in files:
        if last[-1:] not in (b"", b"\n") and file.content.kind != "numbers":
            yield b"\n"
        for chunk in file.chunks():
            if chunk:
                yield chunk
                last = chunk


def _content(path: Path) -> Content:
    try:
        return recognise(path)
    except OSError as error:
        raise ValueError(f"data.path={path}: cannot be read: {_first_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"data.path={path}: {error}") from error


def _check(file: File, config: DataConfig) -> None:
    kind, wants_ids = file.content.kind, config.kind == Tokenizer.ids
    if kind == "unreadable":
        raise file.refuse(file.content.reason)
    if kind == "json_array" and config.text_field is not None:
        raise file.refuse(f"{file.content.reason}; data.text_field=null reads it as it is")
    if kind != "numbers":
        if wants_ids:
            raise file.refuse("data.tokenizer=ids: it holds text, not 16-bit ids; use bytes or bpe")
        if kind == "parquet" and config.text_field is None:
            raise file.refuse("is a parquet file: data.text_field=NAME names its column of text")
        return
    if not wants_ids and config.kind != Tokenizer.file:
        most = highest_id(file)
        raise file.refuse(
            f"{file.content.reason}; if it is 16-bit token ids (nanoGPT's .bin), the highest is "
            f"{most}: data.tokenizer=ids data.vocab_size={most + 1} (or what the vocabulary has) "
            "trains on them, data.tokenizer=FILE with their tokenizer.json too"
        )


def highest_id(file: File) -> int:
    """Return the largest of a file's 16-bit ids."""
    return max(int(np.frombuffer(chunk, "<u2").max()) for chunk in file.chunks())


def _paths(name: str) -> list[Path]:
    """The files that data.path stands for, sorted: one, those below a folder, or of a pattern."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if _is_seen(p.relative_to(path))]
        files = [p for p in found if p.is_file()]
        if not files:
            raise ValueError(f"data.path={name}: holds no file")
    elif path.exists():
        if not path.is_file():
            raise ValueError(f"data.path={name}: is not a file")
        files = [path]
    elif glob.has_magic(name):
        files = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
        if not files:
            raise ValueError(f"data.path={name}: no file fits this pattern")
    else:
        raise ValueError(f"data.path={name}: no such file")
    sizes = [_size(p) for p in files]
    if not any(sizes):
        raise ValueError(f"data.path={name}: is empty")
    return [p for p, size in zip(files, sizes, strict=True) if size]


def _first_line(error: OSError) -> str:
    return error.strerror or str(error).partition("\n")[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ValueError(f"data.path={path}: cannot be read: {error.strerror}") from error


def _is_seen(path: Path) -> bool:
    """Return whether no part of a path begins with a dot."""
    return not any(part.startswith(".") for part in path.parts)
