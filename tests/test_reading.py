"""Files are recognised by what they hold: read as the text that they are, or refused in a line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt.config import DataConfig, Source
from minigpt.corpus import Corpus, prepare

TEXT = "Grüße, 世界! 'quoted'\n\tdef f(x): return x\n" * 300
UTF8 = TEXT.encode()
DOCUMENTS = ["First document.\nIt has two lines.", "Zweites: Grüße!", "世界"] * 200
JOINED = "".join(text + "\n\n" for text in DOCUMENTS).encode()
JSON_LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in DOCUMENTS).encode()


def corpus_of(path: Path, **given: Any) -> Corpus:
    cache = str(path.parent.parent / "cache")
    return prepare(DataConfig(Source.text, path=str(path), cache=cache, **given))


def trained_on(corpus: Corpus) -> bytes:
    """The bytes of both splits, in order."""
    splits = [corpus.tokens(split) for split in ("train", "validation")]
    return np.concatenate(splits).astype("u1").tobytes()


def saved(tmp_path: Path, content: bytes, name: str = "file") -> Path:
    path = tmp_path / "given" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refusal(path: Path, **given: Any) -> str:
    """The one line that refuses a file; nothing is left in the cache."""
    with pytest.raises(ValueError, match=r"^data\.") as error:
        corpus_of(path, **given)
    assert "\n" not in str(error.value)
    assert not list((path.parent.parent / "cache").glob("*"))
    return str(error.value)


READ = {
    "utf-8": (UTF8, UTF8),
    "utf-8 with a mark": (b"\xef\xbb\xbf" + UTF8, UTF8),
    "utf-8 that the end cuts": (UTF8 + "é".encode()[:1], UTF8 + "é".encode()[:1]),
    "utf-16 with a mark": (TEXT.encode("utf-16"), UTF8),
    "utf-16-be with a mark": (b"\xfe\xff" + TEXT.encode("utf-16-be"), UTF8),
    "utf-16-le without": (TEXT.encode("utf-16-le"), UTF8),
    "utf-16-be without": (TEXT.encode("utf-16-be"), UTF8),
    "chinese utf-16-le without": (("天地玄黄。宇宙洪荒。\n" * 400).encode("utf-16-le"),
                                  ("天地玄黄。宇宙洪荒。\n" * 400).encode()),
    "utf-32 with a mark": (TEXT.encode("utf-32"), UTF8),
    "gzip": (gzip.compress(UTF8), UTF8),
    "bzip2": (bz2.compress(UTF8), UTF8),
    "xz": (lzma.compress(UTF8), UTF8),
    "gzip of utf-16": (gzip.compress(TEXT.encode("utf-16")), UTF8),
    "json lines": (JSON_LINES, JOINED),
    "json lines in gzip": (gzip.compress(JSON_LINES), JOINED),
    "json lines in utf-16": (JSON_LINES.decode().encode("utf-16"), JOINED),
    "one line of json": (json.dumps({"text": "x" * 200_000}).encode(), b"x" * 200_000 + b"\n\n"),
    "text that begins with a brace": (b"{a set} of words\n" * 50, b"{a set} of words\n" * 50),
    "a log with colours": (b"\x1b[31mred\x1b[0m\n" * 50, b"\x1b[31mred\x1b[0m\n" * 50),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_what_can_be_read_is_read_as_its_text(kind: str, tmp_path: Path) -> None:
    content, wanted = READ[kind]
    assert trained_on(corpus_of(saved(tmp_path, content, "file.dat"))) == wanted


def test_characters_that_chunks_split_are_whole(tmp_path: Path) -> None:
    """Chunks are 1 MiB: 3-byte characters and surrogate pairs lie across their ends."""
    text = "x" + "世" * 400_000 + "y" + "\U0001f600" * 300_000 + "\n"
    for encoding in ("utf-8", "utf-16"):
        path = saved(tmp_path, text.encode(encoding))
        assert trained_on(corpus_of(path)) == text.encode()


def test_the_same_text_in_other_clothes_is_the_same_corpus(tmp_path: Path) -> None:
    """The cache follows the content: one folder for four files, another after a change."""
    packed = (UTF8, b"\xef\xbb\xbf" + UTF8, TEXT.encode("utf-16"), gzip.compress(UTF8))
    folders = {corpus_of(saved(tmp_path, c, str(i))).folder for i, c in enumerate(packed)}
    assert len(folders) == 1
    changed = corpus_of(saved(tmp_path, UTF8 + b"!", "0"))
    assert changed.folder not in folders and trained_on(changed) == UTF8 + b"!"


def test_corpora_of_plain_text_keep_their_names(tmp_path: Path) -> None:
    """What version 0.1.0 made of it; runs that are there name this folder."""
    corpus = corpus_of(saved(tmp_path, "naïve text\n".encode() * 100))
    assert corpus.folder.name == "text-cba46505a871e62e"
    made_up = DataConfig(Source.generated, vocab_size=64, tokens=5000, cache=str(tmp_path))
    assert prepare(made_up).folder.name == "generated-cf0ac907b22ea39d"


def pdf() -> bytes:
    return b"%PDF-1.7\n1 0 obj << /Type /Catalog >> endobj\n" * 20


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("book.txt")
        member.size = len(UTF8)
        archive.addfile(member, io.BytesIO(UTF8))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("book.txt", TEXT)
    return out.getvalue()


def of_torch() -> bytes:
    import torch

    out = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, out)
    return out.getvalue()


def of_safetensors() -> bytes:
    import torch
    from safetensors.torch import save

    return save({"weight": torch.zeros(3)})


def array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(100))
    return out.getvalue()


def picture() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "png")
    return out.getvalue()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip": (zipped, "is a zip archive .*; unpack it"),
    "tar": (tarred, "is a tar archive, not text; unpack it"),
    "tar in gzip": (lambda: gzip.compress(tarred()), "is a tar archive"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + bytes(range(256)), "is zstd, not text; zstd -d"),
    "pdf": (pdf, "is a PDF, not text; pdftotext"),
    "png": (picture, "is an image"),
    "jpeg": (lambda: b"\xff\xd8\xff\xe0" + bytes(400), "is an image"),
    "elf": (lambda: b"\x7fELF\x02\x01\x01" + bytes(400), "is an ELF program"),
    "torch": (of_torch, "is a file of torch.save, not text; weights are not data"),
    "safetensors": (of_safetensors, "is a .safetensors file, not text; weights are not data"),
    "npy": (array, "is a NumPy array"),
    "pickle": (lambda: pickle.dumps({"text": TEXT}), "is a pickle, which could run code"),
    "latin-1": (
        lambda: "déjà vu\n".encode("latin-1") * 90,
        r"is not UTF-8 \(byte 0xE9 at 1\); if it is Latin-1, iconv -f LATIN1 -t UTF-8 file.txt > ",
    ),
    "latin-1 far behind": (
        lambda: b"plain\n" * 300_000 + b"d\xe9j\xe0 vu\n",
        r"is not UTF-8 \(byte 0xE9 at 1,800,001\)",
    ),
    "cut utf-16": (lambda: TEXT.encode("utf-16")[:-1], "is cut short"),
    "cut gzip": (lambda: gzip.compress(UTF8 * 20)[:-300], "is damaged or cut short"),
    "cut xz": (lambda: lzma.compress(np.random.default_rng(0).bytes(9000))[:-300], "is damaged"),
    "noise": (lambda: np.random.default_rng(0).bytes(5001), "binary data of no kind that is known"),
    "zeros": (lambda: bytes(999), "binary data of no kind that is known here"),
    "json array": (
        lambda: json.dumps([{"text": t} for t in DOCUMENTS]).encode(),
        r"is one JSON array, not a line a document; jq -c '\.\[\]' file.txt",
    ),
    "json lines without the field": (
        lambda: b'{"content": "x", "id": 3}\n' * 9,
        "line 1 has no field 'text'; data.text_field=NAME names another: it has content, id",
    ),
    "json lines with a number": (
        lambda: JSON_LINES + b'{"text": 3}\n',
        "data.text_field=text: line 601 has a int there, not text",
    ),
    "a line that is no json": (
        lambda: JSON_LINES + b"{",
        "line 601 is not JSON; data.text_field=null reads the lines as they are",
    ),
    "no text at all": (lambda: gzip.compress(b""), "holds no text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_text_is_refused_by_what_it_is(kind: str, tmp_path: Path) -> None:
    """A name that says .txt changes nothing."""
    make, said = REFUSED[kind]
    path = saved(tmp_path, make(), "file.txt")
    line = refusal(path)
    assert str(path) in line and re.search(said, line), line


def test_the_field_of_json_lines_is_the_users(tmp_path: Path) -> None:
    path = saved(tmp_path, b'{"body": "one"}\n\n{"body": null}\n{"body": "two"}\n' * 40)
    assert trained_on(corpus_of(path, text_field="body")) == b"one\n\ntwo\n\n" * 40
    assert trained_on(corpus_of(path, text_field=None)) == path.read_bytes()


def test_parquet_is_read_by_its_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": [*DOCUMENTS, None], "id": range(len(DOCUMENTS) + 1)})
    path = tmp_path / "given" / "part"
    path.parent.mkdir()
    parquet.write_table(table, path, row_group_size=100)
    assert trained_on(corpus_of(path)) == JOINED
    other = tmp_path / "again" / "cache"  # nothing of the first is in it
    assert "no column of text has that name; there is text" in refused(path, other, "id")
    assert "data.text_field=NAME names its column" in refused(path, other, None)
    path.write_bytes(b"PAR1" + bytes(60) + path.read_bytes()[64:])
    line = refused(path, other, "text")
    assert line.startswith(f"data.path={path}: ") and "\n" not in line


def refused(path: Path, cache: Path, field: str | None) -> str:
    with pytest.raises(ValueError) as error:
        prepare(DataConfig(Source.text, path=str(path), text_field=field, cache=str(cache)))
    return str(error.value)


def test_parquet_without_its_package_names_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = refusal(saved(tmp_path, b"PAR1" + bytes(100) + b"PAR1"))
    assert "needs the package pyarrow: pip install pyarrow" in line


def test_a_folder_or_a_pattern_is_all_of_its_files_in_order(tmp_path: Path) -> None:
    saved(tmp_path, b"second, no end", "b/c.txt")
    saved(tmp_path, gzip.compress(b"first\n"), "a.txt")
    saved(tmp_path, JSON_LINES, "d.jsonl")
    saved(tmp_path, b"hidden", ".cache/x")
    saved(tmp_path, b"", "empty")
    given = tmp_path / "given"
    cache = str(tmp_path / "cache")

    def read(name: str) -> bytes:
        return trained_on(prepare(DataConfig(Source.text, path=name, cache=cache)))

    assert read(str(given)) == b"first\nsecond, no end\n" + JOINED
    assert read(f"{given}/**/*.txt") == b"first\nsecond, no end"
    saved(tmp_path, picture(), "e.png")
    with pytest.raises(ValueError, match=r"^data.path=.*given/e.png: is an image"):
        read(str(given))


IDS = np.random.default_rng(0).integers(0, 50257, 4000).astype("<u2")
LETTERS = np.random.default_rng(0).integers(0, 65, 4000).astype("<u2")


@pytest.mark.parametrize("ids", [IDS, LETTERS], ids=["gpt2", "letters"])
def test_ids_are_refused_with_their_highest_until_their_vocabulary_is_named(
    ids: np.ndarray, tmp_path: Path
) -> None:
    path = saved(tmp_path, ids.tobytes(), "train.bin")
    size = int(ids.max()) + 1
    line = refusal(path)
    assert f"the highest is {size - 1}: data.tokenizer=ids data.vocab_size={size} " in line
    line = refusal(path, tokenizer="ids", vocab_size=size - 1)
    assert f"data.vocab_size={size - 1}: the data holds the id {size - 1}" in line
    corpus = corpus_of(path, tokenizer="ids", vocab_size=size)
    both = np.concatenate([corpus.tokens("train"), corpus.tokens("validation")])
    assert (both == ids).all() and corpus.bytes_per_token is None
    assert corpus.vocab_size == size and corpus.sizes["validation"] == 400


def test_text_is_no_ids(tmp_path: Path) -> None:
    path = saved(tmp_path, UTF8)
    assert "it holds text, not 16-bit ids" in refusal(path, tokenizer="ids", vocab_size=60000)
    with pytest.raises(ValueError, match=r"^data.vocab_size is not set"):
        DataConfig(Source.text, path="x", tokenizer="ids")


def test_a_long_text_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = saved(tmp_path, b"")
    with open(path, "wb") as file:
        for _ in range(32):
            file.write(b"0123456789abcde\n" * 2**16)
    tracemalloc.start()
    try:
        corpus = corpus_of(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(corpus.sizes.values()) == 2**25
    assert peak < 2**24, f"{peak / 2**20:.0f} MiB for a text of 32 MiB"


def test_splits_follow_each_other(tmp_path: Path) -> None:
    corpus = corpus_of(saved(tmp_path, TEXT.encode("utf-16")), validation_fraction=0.25)
    edges = [0, corpus.sizes["train"], len(UTF8)]
    for split, (start, end) in zip(("train", "validation"), pairwise(edges), strict=True):
        assert corpus.tokens(split).tobytes() == UTF8[start:end]
    assert corpus.sizes["validation"] == -(-len(UTF8) // 4)
