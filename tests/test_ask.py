"""./launch.sh ask: what is near to free words, where numbers are from, and that runs are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import launch
from experiments.__main__ import main
from experiments.ask import command as ask
from experiments.ask import kept
from experiments.ask.answer import Answer, Picture, Table, markdown, say
from experiments.ask.evidence import Evidence, Run, RunFailed, value_at
from experiments.ask.quantity import Quantity, combined, formula, mean, published
from experiments.ask.words import nearest, wanted
from experiments.lab.node_bytes import leaving
from experiments.overrides import composed
from experiments.predict import search
from experiments.predict.search import find
from tests.launching import SMALL

PACKAGES = ("costs", "minigpt", "parallel", "simulator")


def measured(value: float, unit: str = "B") -> Quantity:
    return Quantity("measured", value, unit, "measured", "runs/ask/x", "step.tokens")


def test_a_number_made_of_others_is_as_good_as_the_weakest() -> None:
    by_form = formula("form", 50.0, "B", "./launch.sh simulate")
    others = published("other", 4.0, "B", "a paper, table 1")
    ratio = measured(100.0) / by_form
    assert (ratio.value, ratio.unit, ratio.source) == (2.0, "times", "formula")
    assert ratio.run == "runs/ask/x; ./launch.sh simulate"
    assert (measured(100.0) - others).source == "published"
    assert (measured(100.0) + measured(1.0)).source == "measured"
    assert f"{ratio.as_share()}" == "200.0 % [f]" and f"{measured(2e6):plain}" == "2.00 MB"
    assert mean("mean", [measured(1.0), measured(4.0)]).value == 2.5
    with pytest.raises(AssertionError):
        combined("sum", "+", (measured(1.0), measured(1.0, "s")), "B")


def test_places_of_a_ledger() -> None:
    rows = [
        {"axis": "tp", "phase": "forward", "bytes": 3},
        {"axis": "tp", "phase": "backward", "bytes": 4},
        {"axis": "pp", "phase": "forward", "bytes": 5},
    ]
    ledger = {"step": {"rows": rows, "unseen": None}, "ranks": [{"peak": 7}, {"peak": 9}]}
    assert value_at(ledger, "ranks[1].peak") == 9 and value_at(ledger, "ranks[-1].peak") == 9
    assert value_at(ledger, "step.rows[axis=tp].bytes") == 7
    assert value_at(ledger, "step.rows[axis=tp,phase=backward].bytes") == 4
    assert value_at(ledger, "step.rows[].bytes") == 12
    assert value_at(ledger, "step.unseen[axis=tp].bytes") is None
    assert value_at({"rejected": {"out of memory": 3}}, "rejected[out of memory]") == 3
    with pytest.raises(ValueError, match="was not measured"):
        Run("x", ledger, "runs/x", "measured").at("step.unseen", "B")
    with pytest.raises(KeyError):
        value_at(ledger, "step.rows[axis=tp].seconds")


def test_a_column_of_one_source_says_so_in_its_head() -> None:
    rows: list[list[Any]] = [
        ["a", measured(1.0), measured(2.0)],
        ["b", measured(3.0), formula("f", 4.0, "B", "c")],
        ["c", None, None],
    ]
    table = Table("title", ["name", "one", "two"], rows)
    assert table.heads == ["name", "one [m]", "two"]
    assert list(table.cells())[1:] == [["b", "3 B", "4 B [f]"], ["c", "-", "-"]]
    said = say("{a} of {b}", a=measured(5.0), b=say("{c}", c=measured(6.0)))
    answer = Answer([said], [table])
    assert said.text == "5 B [m] of 6 B [m]"
    assert sorted(n.value for n in answer.numbers) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    lines = markdown("Question?", answer, lambda picture: picture.name)
    assert "| b | 3 B | 4 B [f] |" in lines


def test_a_picture_is_drawn_once_for_the_same_data(tmp_path: Path) -> None:
    drawn = []

    def draw(path: Path) -> None:
        drawn.append(path)
        path.write_bytes(b"png")

    first = Picture("p", "caption", draw, "key").at(tmp_path)
    assert Picture("p", "caption", draw, "key").at(tmp_path) == first and len(drawn) == 1
    assert Picture("p", "caption", draw, "other").at(tmp_path) != first and len(drawn) == 2


def test_every_question_has_what_a_file_must_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["questions"]
    assert len(listed) == 10 and [entry["name"] for entry in listed] == list(ask.names())
    for name, path in ask.names().items():
        module = ask.module(path)
        assert module.__doc__ and module.QUESTION and module.WORDS and callable(module.answer), name
    orders = [ask.module(path).ORDER for path in ask.names().values()]
    assert orders == sorted(set(orders))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("why is my loss nan", "which-precision"),
        ("zero bubble pipeline schedules", "how-big-is-the-bubble"),
        ("out of memory, what can I do", "where-does-memory-go"),
        ("memroy of activatons", "where-does-memory-go"),
        ("roofline", "what-limits-throughput"),
        ("how many gpus for my budget", "how-far-does-data-parallelism-scale"),
        ("slow ethernet between nodes", "least-communication"),
        ("gradient accumulation", "what-does-accumulation-change"),
        ("when is fsdp slower than ddp", "when-does-fsdp-cost-time"),
    ],
)
def test_free_words_find_the_question(words: str, name: str) -> None:
    about = {n: f"{ask.question(n)} {ask.module(p).WORDS}" for n, p in ask.names().items()}
    assert nearest(words, about)[0] == name
    assert nearest("xylophone", about) == []


@pytest.mark.parametrize(
    ("text", "model", "cluster", "gpus"),
    [
        ("70B on 512 H100", "llama3_70b", "h100", 512),
        ("train llama3 8b on 64 A100 40GB", "llama3_8b", "a100_40g", 64),
        ("405B, 16,384 H100s", "llama3_405b", "h100", 16384),
        ("175b model on 32 nodes of 8 A100", "gpt3_175b", "a100_80g", 256),
        ("gpt2 xl with 4 nodes of V100", "gpt2_xl", "v100", 32),
        ("mixtral 8x7b on 128 GB200 NVL72", "mixtral_8x7b", "gb200_nvl72", 128),
        ("70B, 4M batch on 512 gpus of h200", "llama3_70b", "h200", 512),
        ("70B on H100", "llama3_70b", "h100", None),
        ("a 23B model on 8 B200", None, "b200", 8),
        ("what is a pipeline", None, None, None),
    ],
)
def test_a_model_a_cluster_and_a_number(
    text: str, model: str | None, cluster: str | None, gpus: int | None
) -> None:
    found = wanted(text)
    assert (found.model, found.cluster, found.gpus) == (model, cluster, gpus)


def test_free_words_run_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # what it finds is kept
    assert main(["ask", "8B on 8 H100", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert main(["search", "model=llama3_8b", "cluster=h100", "gpus=8", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["plans"][0]
    assert best["label"] in said["conclusion"]
    values = {number["label"]: number["value"] for number in said["numbers"]}
    assert values[f"plan 1, {best['label']}: time s"] == best["time_s"]
    assert {number["source"] for number in said["numbers"]} == {"formula"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["ask", "--wrong"], "--wrong: ask takes"),
        (["ask", "xylophone"], "xylophone: no question is near"),
        (["playground", "port=x"], "port=x: must be between 1 and 65535"),
        (["playground", "host=0.0.0.0"], "host=0.0.0.0: playground takes port=NUMBER"),
    ],
)
def test_what_is_refused(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert says in capsys.readouterr().err


def test_keys_compose_as_on_a_command_line() -> None:
    config = composed("train", ("strategy=single", "layout.tp=2", "clip=null", "precision=bf16"))
    assert config.layout.tp == 2 and config.layout.dp_replicate == 1 and config.clip is None
    assert config.precision.value == "bf16" and config.seq_len == config.model.context


def test_a_search_is_kept_until_the_question_or_the_simulator_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ("model=gpt2_xl", "cluster=h100", "gpus=2", "schedule=[1f1b]")
    first = Evidence().searched("a", *keys)
    (path,) = Path("runs/ask").glob("search-*.json")
    done: list[Any] = []

    def noted(config: Any) -> Any:
        done.append(config)
        return find(config)

    monkeypatch.setattr(search, "find", noted)
    assert Evidence().searched("a", *keys) == first and not done
    for others in (("gpus=4",), ("cluster.between_nodes.bandwidth=1e9",), ("top=1",)):
        Evidence().searched("b", *keys, *others)
    assert len(done) == 3
    assert Evidence(again=True).searched("a", *keys) == first and len(done) == 4
    path.write_text(path.read_text()[:100])  # cut short
    assert Evidence().searched("a", *keys) == first and len(done) == 5
    monkeypatch.setattr(kept, "code_of", lambda *_: "another version")
    assert Evidence().searched("a", *keys) == first and len(done) == 6
    assert Evidence().searched("a", *keys) == first and len(done) == 6


def test_the_version_of_code_is_that_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    version = kept.code_of.__wrapped__
    (tmp_path / "simulator" / "deep").mkdir(parents=True)
    (tmp_path / "simulator" / "deep" / "a.py").write_text("x = 1")
    first = version("simulator")
    assert version("simulator") == first
    (tmp_path / "simulator" / "notes.txt").write_text("no code")
    assert version("simulator") == first
    (tmp_path / "simulator" / "deep" / "a.py").write_text("x = 2")
    assert version("simulator") != first


def test_all_that_a_search_runs_is_in_its_version() -> None:
    """What experiments.predict.search loads of ours is hashed, but for what reads and prints."""
    code = "import sys, experiments.predict.search; "
    code += "print(*(m for m, made in sys.modules.items() if not hasattr(made, '__path__')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = [m for m in done.stdout.split() if m.startswith((*PACKAGES, "experiments."))]
    paths = {m.replace(".", "/") + ".py" for m in ours} | set(PACKAGES)
    left = {p for p in paths if not p.startswith(kept.SIMULATOR) and p not in kept.SIMULATOR}
    asks = ("compose", "config", "console", "outside_text", "overrides", "refused")
    asks += ("free_text", "outside_yaml", "saved_config")
    assert left <= {f"experiments/{name}.py" for name in (*asks, "predict/search_tables")}


def test_bytes_between_nodes() -> None:
    """A ring of four ranks on two nodes crosses twice; one of neighbours in a node never."""
    keys = ("model=tiny", "cluster=laptop", "precision=fp32")
    ring = Evidence().simulated("ddp", *keys, "layout.dp_replicate=4")
    each = ring.wire(axis="dp_replicate").value
    assert leaving(ring, 2).value == 2 * each
    assert leaving(ring, 4).value == 0 and leaving(ring, 1).value == 4 * each
    inner = Evidence().simulated("hsdp", *keys, "layout.dp_replicate=2", "layout.dp_shard=2")
    between = inner.wire(axis="dp_replicate").value
    both = sum(
        row["wire_bytes"]
        for row in inner.ledger["step"]["communication"]
        if row["axis"] == "dp_replicate*dp_shard"
    )
    assert leaving(inner, 2).value == 4 * between + 2 * both


@pytest.mark.slow
def test_a_run_is_kept_and_a_failure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [key for key in SMALL if not key.startswith(("sample", "validation"))]
    first = Evidence().measured("a", *tiny, "strategy=single")
    assert first.source == "measured" and (Path(first.run) / "ledger.json").exists()
    wild = (*tiny, "strategy=single", "optimizer.lr=1e30", "clip=null", "steps=6")
    reason = Evidence().attempted("b", *wild)
    assert isinstance(reason, str) and "NonFinite" in reason

    def never(*_: Any, **__: Any) -> int:
        raise AssertionError("started again")

    monkeypatch.setattr(launch, "run", never)
    again = Evidence()
    assert again.measured("a", *tiny, "strategy=single") == first
    assert again.ledgers == {first.run: first.ledger}
    with pytest.raises(RunFailed, match="NonFinite"):
        again.measured("b", *wild)
    with pytest.raises(AssertionError, match="started again"):
        Evidence(again=True).measured("a", *tiny, "strategy=single")
