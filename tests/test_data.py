"""Text, its encoding on disk, and batches as a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt import sources
from minigpt.config import DataConfig, Source
from minigpt.corpus import Corpus, check_vocabulary, open_corpus, prepare
from minigpt.data import Batches
from minigpt.model import IGNORE
from minigpt.sources import fetched_once, splitmix64, standard_library, write_whole
from minigpt.tokenizer import make_tokenizer


def generated(cache: Path, **changes: object) -> Corpus:
    made = {"source": Source.generated, "vocab_size": 64, "tokens": 5000, **changes}
    return prepare(DataConfig(cache=str(cache), **made))  # type: ignore[arg-type]


def test_the_default_is_the_interpreters_own_library(tmp_path: Path) -> None:
    corpus = prepare(DataConfig(cache=str(tmp_path)))
    text = standard_library()
    assert b"def " in text and len(text) > 1_000_000
    assert corpus.sha256 == hashlib.sha256(text).hexdigest()
    both = np.concatenate([corpus.tokens("train"), corpus.tokens("validation")])
    assert both.astype("u1").tobytes() == text
    assert corpus.sizes["validation"] == math.ceil(0.1 * len(text))
    assert isinstance(corpus.tokens("train"), np.memmap)
    assert 2.5 < corpus.unigram_entropy < 3.7
    assert prepare(DataConfig(cache=str(tmp_path))) == corpus
    assert len(list(tmp_path.iterdir())) == 1, "no part of a folder is left"


def test_splitmix_is_the_published_sequence() -> None:
    """The first outputs for state 0 advance by the golden gamma (Steele, Lea, Flood 2014)."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([i * gamma % 2**64 for i in range(3)], dtype=np.uint64)
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(states).tolist() == wanted


def test_generated_text_is_the_same_everywhere(tmp_path: Path) -> None:
    corpus = generated(tmp_path)
    assert corpus.sha256 == "41851fcb3e48672514872a008c9b5cbae2623f69ccf75e20d40e34393ea22c3c"
    assert corpus.tokenizer == "numbers" and corpus.bytes_per_token is None


def test_own_text_and_trained_bpe_come_back_whole(tmp_path: Path) -> None:
    text = "Grüße, 世界! def f(x):\n\treturn x\n" * 400
    (tmp_path / "own.txt").write_text(text)
    config = DataConfig(
        Source.text,
        path=str(tmp_path / "own.txt"),
        tokenizer="bpe",
        vocab_size=300,
        cache=str(tmp_path / "cache"),
    )
    corpus = prepare(config)
    tokenizer = make_tokenizer(corpus.tokenizer, corpus.vocab_size, corpus.folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    whole = tokenizer.decode(corpus.tokens("train").tolist())
    assert text.startswith(whole[:1000]) and corpus.tokens("train").max() < 300
    assert corpus.dtype == "uint16" and corpus.bytes_per_token and corpus.bytes_per_token > 2


def test_bytes_come_back_whole(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bytes", 256, tmp_path)
    assert tokenizer.decode(tokenizer.encode("naïve ☃")) == "naïve ☃"
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"


@given(
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**40),
    cuts=st.lists(st.integers(1, 11), max_size=4, unique=True),
)
@settings(max_examples=40)
def test_a_batch_is_the_same_however_it_is_shared(
    tmp_path_factory: pytest.TempPathFactory, step: int, seed: int, cuts: list[int]
) -> None:
    corpus = generated(tmp_path_factory.getbasetemp() / "cache")
    batches = Batches(corpus, 16, 12, seed, ragged=True)
    whole = batches.rows(step, 0, 12)
    edges = [0, *sorted(cuts), 12]
    parts = [batches.rows(step, a, b - a) for a, b in pairwise(edges)]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


def test_sequences_are_numbered_through_training_not_by_batch_size(tmp_path: Path) -> None:
    """Two batches of 4 are one of 8: changing the accumulation changes no sample."""
    corpus = generated(tmp_path)
    small, large = Batches(corpus, 16, 4, 3), Batches(corpus, 16, 8, 3)
    joined = torch.cat([small.rows(6, 0, 4)[0], small.rows(7, 0, 4)[0]])
    assert torch.equal(joined, large.rows(3, 0, 8)[0])
    assert not torch.equal(joined, large.rows(4, 0, 8)[0])
    assert not torch.equal(large.rows(3, 0, 8)[0], Batches(corpus, 16, 8, 4).rows(3, 0, 8)[0])


def test_targets_are_the_next_tokens_of_the_training_split(tmp_path: Path) -> None:
    corpus = generated(tmp_path)
    inputs, targets = Batches(corpus, 32, 4, 0).rows(0, 0, 4)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = corpus.tokens("train").astype("u1").tobytes()
    for row, last in zip(inputs, targets[:, -1], strict=True):
        assert bytes([*row.tolist(), int(last)]) in text


def test_places_cover_the_split_evenly(tmp_path: Path) -> None:
    corpus = generated(tmp_path, tokens=2000)
    seen = np.zeros(2000)
    batches = Batches(corpus, 1, 1000, 0)
    for step in range(18):
        hashes = splitmix64(
            splitmix64(np.array([0])) ^ (np.arange(1000) + step * 1000).astype("u8")
        )
        seen += np.bincount((hashes % np.uint64(1799)).astype(int), minlength=2000)
        assert batches.rows(step, 0, 1000)[0].shape == (1000, 1)
    assert seen[:1799].min() >= 1 and seen[:1799].max() < 40 and seen[1799:].sum() == 0


def test_ragged_sequences_end_at_random_and_some_are_empty(tmp_path: Path) -> None:
    _, targets = Batches(generated(tmp_path), 16, 400, 0, ragged=True).rows(0, 0, 400)
    counts = (targets != IGNORE).sum(1)
    assert 60 < (counts == 0).sum() < 140
    assert set(counts.tolist()) == set(range(17))
    ended = (targets == IGNORE).int()
    assert (ended.diff(dim=1) >= 0).all(), "nothing counts after the end"


def test_validation_windows_are_held_out_and_spread(tmp_path: Path) -> None:
    corpus = generated(tmp_path, tokens=20_000)
    batches = Batches(corpus, 16, 8, 0)
    windows = (corpus.sizes["validation"] - 1) // 16
    seen = set()
    for index in range(math.ceil(windows / 8)):
        inputs, targets = batches.validation_rows(index, 0, 8)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        seen |= {tuple(row) for row in inputs.tolist()}
    held_out = corpus.tokens("validation")
    all_windows = {tuple(held_out[i * 16 : i * 16 + 16].tolist()) for i in range(windows)}
    assert seen == all_windows


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "is empty"),
        (".", None, "holds no file"),
        ("*.txt", None, "no file fits this pattern"),
        ("pipe", None, "is not a file"),
    ],
)
def test_bad_files_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if name == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match=said) as refused:
        prepare(DataConfig(Source.text, path=str(path), cache=str(tmp_path / "cache")))
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_text_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 100)
    corpus = prepare(
        DataConfig(Source.text, path=str(tmp_path / "short.txt"), cache=str(tmp_path / "cache"))
    )
    corpus.check_length(9)
    with pytest.raises(ValueError, match="seq_len=64: the validation split has 10 tokens, 65"):
        corpus.check_length(64)
    with pytest.raises(ValueError, match=r"model.vocab_size=100: smaller than the data's 256"):
        check_vocabulary(corpus.vocab_size, 100)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_a_cached_corpus_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    path = generated(tmp_path).folder / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[0] ^= 1
    path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    if damage == "remove":
        path.unlink()
    with pytest.raises(ValueError, match="damaged"):
        generated(tmp_path)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^data.cache=.*file") as refused:
        generated(tmp_path / "file")
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"^data.cache="):
        write_whole(tmp_path / "file" / "x", [b"text"])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A web server on loopback, and the folder that it serves."""
    folder = tmp_path / "site"
    folder.mkdir()

    def handler(*args: object) -> Quiet:
        return Quiet(*args, directory=str(folder))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_download_is_checked_and_made_once(
    tmp_path: Path, site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = site
    text = b"ROMEO: " * 1000
    (folder / "input.txt").write_bytes(text)
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"{url}/input.txt")
    config = DataConfig(Source.shakespeare, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"SHA-256 .* is not .*: damaged is what was downloaded"):
        prepare(config)
    assert not list((tmp_path / "cache").iterdir()), "nothing of it is kept"

    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    first = prepare(config)
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"{url}/gone.txt")
    assert prepare(config) == first, "the second time comes from the cache"
    (tmp_path / "cache" / "shakespeare.txt").write_bytes(text[:-1])
    with pytest.raises(ValueError, match="remove it"):
        prepare(config)


def test_a_download_without_a_network_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(ValueError, match=r"data=shakespeare: .*data=stdlib") as refused:
        prepare(DataConfig(Source.shakespeare, cache=str(tmp_path)))
    assert "\n" not in str(refused.value)


def test_a_text_of_another_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("text" * 100)
    wanted = DataConfig(
        Source.text, path=str(tmp_path / "own.txt"), sha256="0" * 64, cache=str(tmp_path)
    )
    with pytest.raises(ValueError, match=r"^data.sha256=0{64}: the text of data=text has [0-9a-f]"):
        prepare(wanted)


def test_a_first_download_sets_the_checksum_of_later_reads(tmp_path: Path) -> None:
    path = tmp_path / "text"
    calls = []

    def fetch() -> list[bytes]:
        calls.append(1)
        return [b"docu", b"ments"]

    for _ in range(2):
        fetched_once("openwebtext", path, None, fetch)
        assert path.read_bytes() == b"documents"
    assert len(calls) == 1
    path.write_bytes(b"document$")
    with pytest.raises(ValueError, match=r"damaged is .*text; remove it"):
        fetched_once("openwebtext", path, None, fetch)


def test_meta_says_what_the_files_hold(tmp_path: Path) -> None:
    corpus = generated(tmp_path, vocab_size=400)
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 400
    assert open_corpus(corpus.folder) == corpus
