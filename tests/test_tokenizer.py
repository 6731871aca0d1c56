"""Tokenizers that are learnt, and those that are given as a file."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.assemble import make_batches, make_trainer, share_of_batch
from experiments.checkpoints import check, read_manifest
from experiments.config import ExportConfig, GenerateConfig, TrainConfig
from experiments.export import run as export
from experiments.figures.parity import mesh_of
from experiments.generate import run as generate
from experiments.launch import Torchrun, prepare_job, settle
from experiments.model_file import read_about, save_model
from experiments.resume import check_fits
from experiments.run_folder import read_config, settings_of
from experiments.run_weights import weights_of
from experiments.saving import Saver
from experiments.weights_file import read_header, write
from minigpt import encoding, progress
from minigpt.by_hand.bpe import LONGEST_PIECE
from minigpt.config import DataConfig, Source
from minigpt.corpus import Corpus, prepare, prepare_for
from minigpt.progress import Progress
from minigpt.tokenizer import make_tokenizer, tokenizer_digest, train_bpe
from parallel.weights import full_weights
from tests.configs import compose

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


# --- whose ids the weights read

TINY = ("model.n_layer=1", "model.d_model=16", "model.n_head=2", "model.context=16", "seq_len=16")
TINY += ("strategy=single", "steps=4", "model.vocab_size=400", "optimizer.lr=0.01")


def config_of(tmp_path: Path, *more: str) -> TrainConfig:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    text = ("data=text", f"data.path={path}", f"data.cache={tmp_path / 'cache'}")
    return compose(*TINY, *text, *more)


def prepared(tmp_path: Path, folder: str, *more: str) -> Path:
    """What the launcher makes of a command line before it starts a process."""
    return prepare_job(config_of(tmp_path, *more), [], Torchrun(), tmp_path / folder).folder


BPE = ("data.tokenizer=bpe", "data.vocab_size=400")


def a_run(tmp_path: Path, *more: str) -> Path:
    """A run of a BPE: its folder, a checkpoint after 2 steps, weights, and an exported file."""
    run = prepared(tmp_path, "run", *more)
    config = config_of(tmp_path, *more)
    corpus = prepare(config.data)
    config = settle(config, Torchrun())
    trainer = make_trainer(config, mesh_of(config.layout))
    trainer.step(
        list(share_of_batch(make_batches(config, corpus), 0, config, trainer.replica.mesh))
    )
    Saver(config, run, trainer, corpus, "a name").save(2)
    about = {"model": settings_of(config)["model"], "tokenizer": corpus.vocabulary}
    save_model(run, full_weights(trainer.replica), corpus, about)
    export(ExportConfig(str(run), str(tmp_path / "model.safetensors")))
    return run


def test_a_digest_of_the_tokenizer_goes_with_whatever_holds_weights(tmp_path: Path) -> None:
    run = a_run(tmp_path, *BPE)
    digest = hashlib.sha256((run / "tokenizer.json").read_bytes()).hexdigest()
    manifest = read_manifest(run / "checkpoints" / "step-000002")
    about = read_about(run)
    assert about and about["tokenizer"] == manifest["tokenizer"] == digest
    assert json.loads((run / "launch.json").read_text())["tokenizer"] == digest
    assert read_header(tmp_path / "model.safetensors").about["tokenizer"] == digest
    assert about["files"]["tokenizer.json"]["sha256"] == digest


def test_weights_of_another_tokenizer_are_refused_before_a_process_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the run has the file that would do, and with it all of them are taken."""
    run = a_run(tmp_path, *BPE)
    given, lora = f"data.tokenizer={run}/tokenizer.json", ("finetune=lora", f"resume={run}")
    wrong = "was trained with the tokenizer.json of SHA-256 [0-9a-f]{12}, and the data has "
    for number, (more, said) in enumerate((
        ((f"init={tmp_path}/model.safetensors",), f"^init=.*: {wrong}data.tokenizer=bytes; "),
        ((f"resume={run}",), f"step-000002: {wrong}data.tokenizer=bytes; {given} would do"),
        (lora, f"^resume={run}: {wrong}data.tokenizer=bytes; {given} would do"),
        (
            (f"init={tmp_path}/model.safetensors", *BPE, "data.bpe_sample=5000"),
            f"^init=.*: {wrong}the tokenizer.json of SHA-256",
        ),
    )):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            prepared(tmp_path, f"refused-{number}", *more)
        assert not (tmp_path / f"refused-{number}").exists()
    capsys.readouterr()
    for number, taken in enumerate((
        (f"init={tmp_path}/model.safetensors", given), (f"resume={run}", given), (*lora, given),
        (f"resume={run}", *BPE), (*lora, given, "data.vocab_size=400"),
    )):  # fmt: skip
        prepared(tmp_path, f"taken-{number}", *taken)
    assert "warning" not in capsys.readouterr().err, "nothing is unverified"


def test_weights_of_bytes_are_no_bpes(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert not (run / "tokenizer.json").exists()
    said = "was trained with data.tokenizer=bytes, and the data has the tokenizer.json of SHA-256"
    with pytest.raises(ValueError, match=f"{said} .*; data.tokenizer=bytes would do"):
        prepared(tmp_path, "other", f"init={tmp_path}/model.safetensors", *BPE)
    with pytest.raises(ValueError, match=said):
        prepared(tmp_path, "other", f"resume={run}", *BPE)
    path = run / "checkpoints"
    (tmp_path / "text.txt").write_text("another text\n" * 999)
    config = settle(compose(*TINY, "data=text", f"data.path={tmp_path}/text.txt"), Torchrun())
    corpus = prepare(replace(config.data, cache=str(tmp_path / "cache")))
    with pytest.raises(ValueError, match=r"^data: its SHA-256 is not that of .*step-000002's"):
        check_fits(check(path / "step-000002"), settings_of(config), config.batch_size, corpus)


def test_weights_that_name_no_tokenizer_are_taken_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path)
    weights, _ = weights_of(run, "run")
    write(tmp_path / "old.safetensors", weights, {"model": settings_of(read_config(run))["model"]})
    prepared(tmp_path, "new", f"init={tmp_path}/old.safetensors")
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1 and "does not say which tokenizer it was trained with" in said[0]


def test_text_is_generated_when_the_cache_is_gone(tmp_path: Path) -> None:
    run = a_run(tmp_path, *BPE)
    shutil.rmtree(tmp_path / "cache")
    assert generate(GenerateConfig(str(run), tokens=4, prompt="def f")).startswith("def f")
    about = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps({**about, "tokenizer": "bytes"}))
    with pytest.raises(ValueError, match=r"model.pt: was trained with data.tokenizer=bytes, and"):
        generate(GenerateConfig(str(run), tokens=4))
    (run / "model.json").write_text(json.dumps(about))
    (run / "tokenizer.json").write_text(train_bpe(LINES, 300))
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        generate(GenerateConfig(str(run), tokens=4))
