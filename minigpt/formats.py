"""Recognises what a file holds by its content, never by its name. No torch.

Text is read as UTF-8, or as UTF-16 or UTF-32 with or without its byte order mark; gzip, bzip2 and
xz are unpacked on the way; JSON lines, parquet and 16-bit token ids are told apart from text.
Everything else has a reason that says what it is and how to convert it.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

SAMPLE = 2**16  # bytes at the beginning that a format is recognised from
LONGEST_LINE = 2**26  # bytes of a first line that is looked at as JSON
MOST_CONTROLS = 0.01  # the largest share of control characters in text
MOST_UNPRINTABLE = 0.001  # the same in UTF-16 without a mark, which is told by little else

PACKED: tuple[tuple[re.Pattern[bytes], Callable[..., Any]], ...] = (
    (re.compile(rb"\x1f\x8b\x08"), gzip.open),
    (re.compile(rb"BZh[1-9]1AY&SY"), bz2.open),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.open),
)
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)

MARKS = (  # UTF-32's little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

ARCHIVE = "unpack it, and give its folder or a pattern: data.path='FOLDER/**/*.txt'"
WEIGHTS = "weights are not data; init=FILE starts from those of a .safetensors file"
# what begins so, and what to do; looked up for what is not text, and for PRINTED in any case
BINARIES = (
    (rb"PK(\x03\x04|\x05\x06).*data\.pkl", "a file of torch.save", WEIGHTS),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive (or .docx, .xlsx, .npz)", ARCHIVE),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", ARCHIVE),
    (rb"Rar!\x1a\x07", "a rar archive", ARCHIVE),
    (rb".{257}ustar", "a tar archive", ARCHIVE),
    (rb"\x28\xb5\x2f\xfd", "zstd", "zstd -d FILE unpacks it"),
    (rb"\x04\x22\x4d\x18", "lz4", "lz4 -d FILE unpacks it"),
    (rb".{6}\x00\x00\{\s*\"", "a .safetensors file", WEIGHTS),
    (rb"GGUF", "a GGUF model", WEIGHTS),
    (
        rb"\x93NUMPY",
        "a NumPy array (.npy)",
        "array.astype('<u2').tofile('ids.bin') makes ids of it",
    ),
    (rb"\x80[\x02-\x05]", "a pickle, which could run code", "write its text to a file first"),
    (rb"\x7fELF", "an ELF program", "give text"),
    (rb"MZ.*PE\x00\x00", "a Windows program", "give text"),
    (rb"(\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe)", "a compiled program", "give text"),
    (rb"SQLite format 3\x00", "an SQLite database", "write its text to a file first"),
    (rb"\x89HDF", "an HDF5 file", "write its text to a file first"),
    (rb"ARROW1|\xff\xff\xff\xff", "an Arrow file", "datasets' to_parquet or to_json converts it"),
    (rb"Obj\x01", "an Avro file", "write its text to a file first"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\x00|MM\x00\*|RIFF.{4}WEBP", "an image", "give text"),
    (rb"RIFF|OggS|fLaC|ID3|.{4}ftyp", "sound or video", "give text"),
    (rb"\xd0\xcf\x11\xe0", "an old Office document", "save it as plain text"),
)
PRINTED = (
    (rb"%PDF-", "a PDF", "pdftotext FILE makes text of it"),
    (rb"%!PS", "PostScript", "ps2ascii FILE makes text of it"),
    (rb"\{\\rtf", "a rich text document (RTF)", "save it as plain text"),
)


@dataclass(frozen=True)
class Content:
    """The kind of data in one file, and how it is read."""

    kind: str  # text | json_lines | parquet | numbers (perhaps 16-bit ids) | unreadable
    unpack: Callable[..., Any] | None = None  # gzip.open and its like
    encoding: str = "utf-8"
    mark: int = 0  # bytes of the byte order mark
    reason: str = ""  # why it cannot be read as text, and what to do

    def open(self, path: Path) -> BinaryIO:
        """The unpacked bytes, behind the byte order mark."""
        unpack = self.unpack or open
        file: BinaryIO = unpack(path, "rb")
        file.read(self.mark)
        return file


def recognise(path: Path) -> Content:
    """Return what a file holds. Raises OSError, or ValueError where a packed file is damaged."""
    with open(path, "rb") as file:
        sample = file.read(SAMPLE)
        unpack = next((way for magic, way in PACKED if magic.match(sample)), None)
        if unpack is None:
            size = file.seek(0, 2)
            if sample.startswith(b"PAR1") and size >= 12:
                file.seek(-4, 2)
                if file.read() == b"PAR1":
                    return Content("parquet")
            return _of(sample, None, path, size)
    try:
        with unpack(path, "rb") as stream:
            sample = stream.read(SAMPLE)
    except DAMAGED as error:
        raise ValueError(f"is damaged or cut short: {error}") from error
    return _of(sample, unpack, path, None)


def _of(sample: bytes, unpack: Callable[..., Any] | None, path: Path, size: int | None) -> Content:
    """Judge by the first bytes. `size` is None if the file is packed."""
    for mark, encoding in MARKS:
        if sample.startswith(mark):
            text = _decoded(sample[len(mark) :], encoding)
            if text is not None and _is_printable(text, MOST_CONTROLS):
                return _as_text(text, Content("text", unpack, encoding, len(mark)), path)
    if found := _named(sample, PRINTED):
        return Content("unreadable", unpack, reason=found)
    text = _decoded(sample, "utf-8")
    if text is not None and "\0" not in text and _is_printable(text, MOST_CONTROLS):
        return _as_text(text, Content("text", unpack), path)
    if found := _named(sample, BINARIES):
        return Content("unreadable", unpack, reason=found)
    wide = _utf16_without_mark(sample) if b"\0" in sample else None
    if wide:
        return _as_text(wide[1], Content("text", unpack, wide[0]), path)
    if b"\0" not in sample and _is_printable(sample.decode("latin-1"), MOST_CONTROLS):
        return Content("unreadable", unpack, reason=not_utf8(path, *_first_bad(sample)))
    if size is not None and size % 2 == 0:
        return Content("numbers", reason="holds binary data of no kind that is known here")
    return Content("unreadable", reason="holds binary data of no kind that is known here")


def not_utf8(path: Path, byte: int, offset: int) -> str:
    """Return the reason for text in an encoding that its bytes do not tell."""
    return (
        f"is not UTF-8 (byte 0x{byte:02X} at {offset:,}); if it is Latin-1, iconv -f LATIN1 "
        f"-t UTF-8 {path.name} > {path.stem}.utf8{path.suffix} converts it"
    )


def _decoded(sample: bytes, encoding: str) -> str | None:
    """The text without a character that the end cuts, or None if it is not in that encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return None


def _first_bad(sample: bytes) -> tuple[int, int]:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError as error:
        return sample[error.start], error.start
    return sample[-1], len(sample) - 1


def _is_printable(text: str, most: float) -> bool:
    """Return whether at most a share of the characters are controls that no text has."""
    controls = sum(map(text.count, _CONTROLS))
    return controls <= most * len(text)


_CONTROLS = [chr(c) for c in range(32) if chr(c) not in "\t\n\r\f\b\x1b"] + ["\x7f"]


def _utf16_without_mark(sample: bytes) -> tuple[str, str] | None:
    """The byte order and the text, where one of the two makes characters that a text has.

    16-bit ids of a tokenizer look alike; among them are controls and code points that stand for
    nothing.
    """
    found = []
    for encoding in ("utf-16-le", "utf-16-be"):
        text = _decoded(sample, encoding)
        if text:
            wrong = sum(
                unicodedata.category(c) in ("Cc", "Cn", "Co") and c not in "\t\n\r\f" for c in text
            )
            ascii_share = sum(c < "\x80" for c in text) / len(text)
            found.append((wrong / len(text), -ascii_share, encoding, text))
    if not found:
        return None
    wrong_share, ascii_negative, encoding, text = min(found)
    if wrong_share > MOST_UNPRINTABLE or not ascii_negative:
        return None
    return encoding, text


def _named(sample: bytes, table: tuple[tuple[bytes, str, str], ...]) -> str:
    found = next(((w, how) for magic, w, how in table if re.match(magic, sample, re.S)), None)
    return f"is {found[0]}, not text; {found[1]}" if found else ""


def _as_text(text: str, content: Content, path: Path) -> Content:
    """Return `content` as JSON lines if its first line is an object of its own, as refused if
    it is one JSON array, and unchanged otherwise."""
    start = text.lstrip()
    if re.match(r"\[\s*\{", start):
        reason = (
            f"is one JSON array, not a line a document; jq -c '.[]' {path.name} > FILE.jsonl "
            "converts it"
        )
        return Content("json_array", content.unpack, content.encoding, content.mark, reason)
    if start.startswith("{") and _is_object(start, content, path):
        return Content("json_lines", content.unpack, content.encoding, content.mark)
    return content


def _is_object(start: str, content: Content, path: Path) -> bool:
    line = start.partition("\n")[0]
    if "\n" not in start:  # the line is longer than the sample
        with content.open(path) as file:
            line = file.read(LONGEST_LINE).decode(content.encoding, "replace").lstrip()
            line = line.partition("\n")[0]
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
