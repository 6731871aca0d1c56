"""Tokenizers that are learnt, and those that are given as a file."""

from __future__ import annotations

import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt import encoding, progress
from minigpt.by_hand.bpe import LONGEST_PIECE
from minigpt.config import DataConfig, Source
from minigpt.corpus import Corpus, prepare, prepare_for
from minigpt.progress import Progress
from minigpt.tokenizer import make_tokenizer, tokenizer_digest, train_bpe

LINES = [f"def f{i}(x):\n\treturn x + {i}  # Grüße\n# end\n\n" for i in range(2000)]
TEXT = "".join(LINES)


def corpus_of(tmp_path: Path, text: str = TEXT, **given: Any) -> Corpus:
    path = tmp_path / "text.txt"
    path.write_text(text)
    return prepare(DataConfig(Source.text, path=str(path), cache=str(tmp_path / "cache"), **given))


def ids_of(corpus: Corpus) -> list[int]:
    return np.concatenate([corpus.tokens(s) for s in ("train", "validation")]).tolist()


@pytest.mark.parametrize("kind", ["bpe", "by_hand_bpe"])
def test_a_text_without_spaces_is_learnt_in_pieces(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of 20,000 letters is one word of GPT-2's, over which the trainer takes minutes."""
    letters = random.Random(0)
    text = "".join(letters.choice("ACGT") for _ in range(20_000))
    corpus = corpus_of(tmp_path, text, tokenizer=kind, vocab_size=300)
    said = capsys.readouterr().err
    assert f"data.tokenizer={kind}: the text has no spaces; " in said
    tokenizer = make_tokenizer(kind, 300, corpus.folder)
    assert tokenizer.decode(ids_of(corpus)) == text
    assert corpus.bytes_per_token and corpus.bytes_per_token > 2
    longest = "A" * 1000
    once = train_bpe([longest], 400)
    assert max(map(len, json.loads(once)["model"]["vocab"])) == LONGEST_PIECE


def test_words_that_are_there_are_not_spoken_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus_of(tmp_path, tokenizer="bpe", vocab_size=300)
    assert "spaces" not in capsys.readouterr().err


def test_a_tokenizer_is_learnt_from_no_more_than_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample is spread over the training split, the same each time, and none of it held out."""
    monkeypatch.setattr(encoding, "BLOCK", 1000)
    data = np.frombuffer(TEXT.encode(), "u1")
    end = len(data) * 9 // 10
    some = list(encoding.sample(data, end, 10_000))
    assert some == list(encoding.sample(data, end, 10_000))
    assert sum(len(line.encode()) for line in some) == pytest.approx(10_000, abs=20)
    numbers = [int(line.partition("(")[0][5:]) for line in some if re.match(r"def f\d+\(", line)]
    assert numbers[0] == 0 and numbers == sorted(numbers)
    last = data[:end].tobytes().count(b"def f") - 1
    assert last - 20 < numbers[-1] <= last and np.diff(numbers).max() < 220
    whole = "".join(encoding.sample(data, end, end))
    assert whole == data[:end].tobytes().decode(errors="replace")


def test_other_samples_are_other_corpora(tmp_path: Path) -> None:
    given: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 320}
    whole = corpus_of(tmp_path, **given)
    part = corpus_of(tmp_path, **given, bpe_sample=3000)
    assert whole.folder != part.folder and whole.sha256 == part.sha256
    for corpus in (whole, part):
        assert make_tokenizer("bpe", 320, corpus.folder).decode(ids_of(corpus)) == TEXT


def test_blocks_are_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are split behind a new line amid text, or anywhere after LONGEST_BLOCK."""
    monkeypatch.setattr(encoding, "BLOCK", 50)
    monkeypatch.setattr(encoding, "LONGEST_BLOCK", 400)
    for text in (TEXT[:5000], "世界" * 900, "one word " * 200, "\n" * 999):
        data = np.frombuffer(text.encode(), "u1")
        made = list(encoding.blocks(data, 0, len(data)))
        assert "".join(made) == text and len(made) > 1
    made = list(encoding.blocks(np.frombuffer(TEXT.encode(), "u1"), 0, 5000))
    assert len(made) > 1
    assert all(block.endswith("Grüße\n") for block in made[:-1])


def test_a_given_tokenizer_makes_the_ids_of_the_whole_text(tmp_path: Path) -> None:
    file = tmp_path / "given.json"
    file.write_text(train_bpe(LINES, 400))
    corpus = corpus_of(tmp_path, tokenizer=str(file))
    assert corpus.tokenizer == "file" and corpus.vocab_size == 400
    assert corpus.digests["tokenizer"] == tokenizer_digest(file.read_text())
    assert (corpus.folder / "tokenizer.json").read_bytes() == file.read_bytes()
    tokenizer, text = make_tokenizer("file", 0, corpus.folder), TEXT.encode()
    first = text[: len(text) - math.ceil(0.1 * len(text))].decode(errors="replace")
    assert corpus.tokens("train").tolist() == tokenizer.encode(first)


def test_a_longest_text_in_a_file_cuts_nothing(tmp_path: Path) -> None:
    """Files of the hub ask for truncation and for special tokens around each text."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(train_bpe(LINES, 400))
    tokenizer.add_special_tokens(["<s>"])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=99)
    tokenizer.save(str(tmp_path / "hub.json"))
    corpus = corpus_of(tmp_path, tokenizer=str(tmp_path / "hub.json"))
    made = make_tokenizer("file", 0, corpus.folder)
    assert made.decode(ids_of(corpus)) == TEXT and start not in ids_of(corpus)
    assert start not in made.encode("def f") and corpus.vocab_size == start + 1


def test_more_ids_than_16_bits_hold_are_kept(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(train_bpe(LINES, 300))
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16)])
    tokenizer.save(str(tmp_path / "large.json"))
    corpus = corpus_of(tmp_path, f"{TEXT}<65535> <0>", tokenizer=str(tmp_path / "large.json"))
    assert corpus.dtype == "uint32" and max(ids_of(corpus)) == corpus.vocab_size - 1 == 2**16 + 299
    assert ids_of(corpus)[-1] == 300


@pytest.mark.parametrize(
    "content, said",
    [
        (None, r"No such file or directory; it takes bytes, bpe, by_hand_bpe, ids or a tokenizer"),
        (b"{}", r"is no tokenizer.json that Hugging Face's tokenizers reads \("),
        (b"\xff\xfe", r"is no tokenizer.json"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_one_line(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "bpee"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^data.tokenizer={path}: {said}") as error:
        corpus_of(tmp_path, tokenizer=str(path))
    assert "\n" not in str(error.value)


def test_ids_that_the_model_has_no_row_for_are_refused_before_the_text_is_read(
    tmp_path: Path,
) -> None:
    file = tmp_path / "given.json"
    file.write_text(train_bpe(LINES, 400))
    config = DataConfig(
        Source.text, path="not there", tokenizer=str(file), cache=str(tmp_path / "cache")
    )
    with pytest.raises(ValueError, match=r"^model.vocab_size=399: smaller than the data's 400 ids"):
        prepare_for(config, 399, 8)
    config.vocab_size = 300
    with pytest.raises(ValueError, match=r"^data.vocab_size=300: data.tokenizer=.* has 400 ids"):
        prepare_for(config, 400, 8)


def test_what_takes_long_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.01)
    with Progress("reading", 4_000_000) as shown:
        shown.done = 1_000_000
        while "25 % of 4.0 MB" not in (said := capsys.readouterr().err):
            time.sleep(0.01)
    assert said.startswith("launch.sh: reading: 25 % of 4.0 MB, ")
    monkeypatch.setattr(progress, "FIRST_S", 60.0)
    with Progress("reading"):
        pass
    assert capsys.readouterr().err == ""
