"""./launch.sh compare: which runs, what differs, what that changed, and what is only noise."""

from __future__ import annotations

import csv
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import main
from experiments.compare.comparison import Comparison, compared
from experiments.compare.config_differences import differences_of
from experiments.compare.find_runs import find_runs, ledger_paths
from experiments.compare.run_costs import says
from tests.made_runs import a_run

SHARDED = {"layout.dp_replicate": 1, "layout.dp_shard": 2}
SPLIT = {"layout.dp_replicate": 1, "layout.tp": 2}


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["compare", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def changed(comparison: Comparison, keys: list[str]) -> dict[str, str]:
    """What a difference changed, in words, by cost."""
    (found,) = (d for d in comparison.differences.elementary if d.keys == keys)
    return {name: says(changes) for name, changes in comparison.changes(found).items()}


def test_two_runs_show_what_differs_and_only_that(tmp_path: Path) -> None:
    a_run(tmp_path / "a", {"run.dir": "a"})
    a_run(tmp_path / "b", {"run.dir": "b", "precision": "bf16"}, step_s=0.06, activations=500)
    comparison = compared([str(tmp_path / "a"), str(tmp_path / "b")])
    (difference,) = comparison.differences.elementary
    assert (difference.before, difference.after) == ({"precision": "fp32"}, {"precision": "bf16"})
    assert comparison.differences.values == [{"precision": "fp32"}, {"precision": "bf16"}]
    changes = changed(comparison, ["precision"])
    assert changes["time_s.total"] == "0.6x"
    assert changes["memory_bytes.activations"] == "0.5x"
    assert changes["memory_bytes.parameters"] == "none"
    assert changes["wire_bytes.all_reduce.dp_replicate"] == "none"


@pytest.mark.parametrize(("factor", "words"), [(1.005, "none (within noise)"), (1.3, "1.3x")])
def test_a_difference_within_the_spread_over_steps_is_none(
    tmp_path: Path, factor: float, words: str
) -> None:
    a_run(tmp_path / "a")
    a_run(tmp_path / "b", {"zero_stage": 1}, step_s=0.1 * factor)
    changes = changed(compared([str(tmp_path)]), ["zero_stage"])
    assert changes["time_s.total"] == words
    # 1 / 1.3, or within the noise of a rate
    assert changes["tokens_per_s"] == (words if "none" in words else "0.769x")


def test_noise_is_half_the_distance_between_the_quartiles_of_timed_steps(tmp_path: Path) -> None:
    a_run(tmp_path / "a", step_s=0.1)
    (costs,) = compared([str(tmp_path)]).costs
    # steps 5 to 39 have 7 each of 0.098, 0.099, 0.1, 0.101, 0.102
    assert costs["time_s.total"].noise == pytest.approx(0.001)
    assert costs["tokens_per_s"].noise == pytest.approx(20480 * 0.01)
    assert costs["memory_bytes.peak"].noise == 0


def test_without_enough_steps_noise_is_not_known(tmp_path: Path) -> None:
    for name, steps, lr in (("a", 5, 1.0), ("b", 5, 2.0)):
        a_run(tmp_path / name, {"steps": steps, "optimizer.lr": lr}, losses=[3.0] * steps)
    changes = changed(compared([str(tmp_path)]), ["optimizer.lr"])
    assert changes["time_s.total"] == "none", "equal is equal"
    a_run(tmp_path / "c", {"steps": 5, "optimizer.lr": 3.0}, losses=[3.0] * 5, step_s=0.2)
    comparison = compared([str(tmp_path / "a"), str(tmp_path / "c")])
    assert changed(comparison, ["optimizer.lr"])["time_s.total"] == "2x (noise not known)"


def test_a_grid_is_told_apart_key_by_key(tmp_path: Path) -> None:
    layouts: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": SHARDED, "tp": SPLIT}
    for number, (name, precision) in enumerate(itertools.product(layouts, ("fp32", "bf16"))):
        speed = {"ddp": 0.1, "fsdp": 0.2, "tp": 0.3}[name] * {"fp32": 1, "bf16": 0.5}[precision]
        settings = {**layouts[name], "precision": precision}
        a_run(tmp_path / "sweep" / str(number), settings, step_s=speed)
    comparison = compared([str(tmp_path / "sweep")])
    found = {tuple(d.keys): d for d in comparison.differences.elementary}
    assert set(found) == {
        ("precision",),
        ("layout.dp_replicate", "layout.dp_shard"),
        ("layout.dp_replicate", "layout.tp"),
    }
    assert found["precision",].pairs == [(0, 1), (2, 3), (4, 5)]
    assert changed(comparison, ["precision"])["time_s.total"] == "0.5x"
    assert changed(comparison, ["layout.dp_replicate", "layout.tp"])["time_s.total"] == "3x"


def test_keys_that_never_change_alone_are_one_difference(tmp_path: Path) -> None:
    a_run(tmp_path / "a")
    a_run(tmp_path / "b", {"precision": "bf16", "model.n_layer": 8})
    (difference,) = compared([str(tmp_path)]).differences.elementary
    assert difference.keys == ["model.n_layer", "precision"]


def test_messages_that_only_one_run_sends(tmp_path: Path) -> None:
    a_run(tmp_path / "a")
    sends = {("all_gather", "dp_shard"): 8000, ("reduce_scatter", "dp_shard"): 4000}
    a_run(tmp_path / "b", SHARDED, messages=sends)
    changes = changed(compared([str(tmp_path)]), ["layout.dp_replicate", "layout.dp_shard"])
    assert changes["wire_bytes.all_reduce.dp_replicate"] == "gone"
    assert changes["wire_bytes.all_gather.dp_shard"] == "new"
    assert changes["wire_bytes"] == "1.5x"  # 4000 + 2000 against 4000


def test_losses_of_the_same_batches_are_compared_step_by_step(tmp_path: Path) -> None:
    """The loss jumps by 0.5 from batch to batch; 0.1 more in each step is not noise."""
    jumps = [3.0 + 0.5 * (i % 2) for i in range(40)]
    a_run(tmp_path / "a", losses=jumps)
    a_run(tmp_path / "b", {"model.n_layer": 2}, losses=[x + 0.1 for x in jumps])
    a_run(tmp_path / "c", {"seed": 1}, losses=[x + 0.1 for x in jumps])
    comparison = compared([str(tmp_path)])
    assert changed(comparison, ["model.n_layer"])["loss"].startswith("1.03x")
    assert changed(comparison, ["seed"])["loss"] == "none (within noise)", "other batches"


def test_steps_of_more_tokens_are_of_other_batches(tmp_path: Path) -> None:
    jumps = [3.0 + 0.5 * (i % 2) for i in range(40)]
    a_run(tmp_path / "a", {"micro_batch_size": 4}, losses=jumps)
    larger = a_run(tmp_path / "b", {"micro_batch_size": 8}, losses=[x + 0.1 for x in jumps])
    ledger = json.loads((larger / "ledger.json").read_text())
    ledger["step"]["tokens"] *= 2
    (larger / "ledger.json").write_text(json.dumps(ledger))
    changes = changed(compared([str(tmp_path)]), ["micro_batch_size"])
    assert changes["loss"] == "none (within noise)"


def test_repeats_of_one_configuration_widen_the_noise(tmp_path: Path) -> None:
    a_run(tmp_path / "a", step_s=0.1)
    a_run(tmp_path / "b", {"clip": 1.0}, step_s=0.11)
    assert changed_after(tmp_path, {"clip": None}) == "1.1x"
    a_run(tmp_path / "again", step_s=0.12)
    assert changed_after(tmp_path, {"clip": None}) == "none (within noise)"


def changed_after(folder: Path, settings: dict[str, Any]) -> str:
    """The step's change by `clip`, which the first run gets here."""
    for name in ("a", "again"):
        path = folder / name / "ledger.json"
        if path.exists():
            ledger = json.loads(path.read_text())
            path.write_text(json.dumps({**ledger, "config": {**ledger["config"], **settings}}))
    return changed(compared([str(folder)]), ["clip"])["time_s.total"]


def test_a_simulation_beside_the_run_of_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "run", step_s=0.1, activations=1000)
    own = {"cluster.name": "laptop", "method": "formula", "device": "auto", "data.source": "random"}
    a_run(tmp_path / "like", own, step_s=0.12, activations=1150, source="formula")
    a_run(tmp_path / "other", {**own, "precision": "bf16"}, source="formula")
    status, out, err = said([str(tmp_path), "--json"], capsys)
    assert status == 0 and err == ""
    found = json.loads(out)
    (prediction,) = found["predictions"]
    numbers = {run["name"]: run["number"] for run in found["runs"]}
    assert (prediction["measured"], prediction["predicted"]) == (numbers["run"], numbers["like"])
    assert prediction["costs"]["time_s.total"]["error"] == pytest.approx(0.2)
    assert prediction["costs"]["memory_bytes.peak"]["error"] == pytest.approx(0.1)
    assert prediction["costs"]["wire_bytes"]["error"] == 0
    keys = [d["key"] for d in found["differences"]]
    assert keys == ["precision"], "data and device mean nothing there"
    _, out, _ = said([str(tmp_path)], capsys)
    assert "measured beside simulated" in out and "formula on laptop" in out and "+20.0%" in out


@pytest.mark.parametrize(
    ("facts", "warned"),
    [
        ({"torch": "2.14.0"}, "torch differs"),
        ({"processor": "Intel"}, "machine differs"),
        ({"corpus": {"source": "text", "sha256": "cd" * 32}}, "corpus differs"),
    ],
)
def test_what_makes_runs_hard_to_compare_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], facts: dict, warned: str
) -> None:
    a_run(tmp_path / "a")
    a_run(tmp_path / "b", facts=facts)
    status, _, err = said([str(tmp_path)], capsys)
    assert status == 0
    assert err.startswith(f"warning: {warned}, ") and err.count("\n") == 1


def test_a_bad_ledger_is_a_line_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [a_run(tmp_path / "runs" / name) for name in ("a", "b", "c", "d")]
    (good[1] / "ledger.json").write_text("{")
    (good[2] / "ledger.json").unlink()
    (good[3] / "metrics.jsonl").write_text('{"loss": 1}\n')
    status, out, err = said([str(tmp_path / "runs"), str(tmp_path / "no"), "--json"], capsys)
    assert status == 2, "there is no such run"
    assert [run["name"] for run in json.loads(out)["runs"]] == ["a", "d"]
    lines = err.splitlines()
    assert len(lines) == 4 and all(line.startswith("launch.sh: ") for line in lines)
    for place in ("b/ledger.json: not a", "c/ledger.json: No", "d/metrics.jsonl: not a", "no: no"):
        assert any(place in line for line in lines), place
    status, _, err = said([str(tmp_path / "no")], capsys)
    assert status == 2 and err.count("\n") == 1


def test_words_become_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("10", "2", "deep/1"):
        a_run(tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "logs").mkdir()
    (tmp_path / "sweep" / "round").symlink_to(tmp_path / "sweep")
    in_order = [Path("sweep") / name / "ledger.json" for name in ("2", "10", "deep/1")]
    assert ledger_paths(["sweep"]) == (in_order, [])
    assert ledger_paths(["sweep/[0-9]*"]) == (in_order[:2], [])
    assert ledger_paths(["sweep/2/ledger.json", "sweep", str(tmp_path / "sweep" / "2")])[0] == (
        in_order
    ), "each once"
    runs, problems = find_runs(["sweep", "none*"])
    assert [run.name for run in runs] == ["2", "10", "1"] and len(problems) == 1


def test_a_run_that_is_not_there_is_named_and_the_status_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "sweep" / "1")
    a_run(tmp_path / "sweep" / "2")
    (tmp_path / "sweep" / "2" / "ledger.json").write_text("{")
    (tmp_path / "empty").mkdir()
    assert main(["compare", "sweep"]) == 0, "one of its runs is there"
    assert "sweep/2/ledger.json: not a ledger" in capsys.readouterr().err
    missing = {"none": "no such file or folder", "empty": "no run is in it", "sweep/2": "not a led"}
    for word, why in missing.items():
        for verb in (["compare"], ["report", f"out={tmp_path / 'page.html'}"]):
            assert main([*verb, "sweep/1", word]) == 2
            captured = capsys.readouterr()
            assert word in captured.err and why in captured.err and captured.out


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    for name in ("x/1", "y/1", "y/2"):
        a_run(tmp_path / name)
    assert [run.name for run in find_runs([str(tmp_path)])[0]] == ["x/1", "y/1", "2"]


def test_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "a")
    a_run(tmp_path / "b|c", {"precision": "bf16"}, step_s=0.05)
    _, out, _ = said([str(tmp_path), "--format", "csv"], capsys)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["precision"] for row in rows] == ["bf16", "fp32"], "the fastest first"
    assert float(rows[1]["time_s.total"]) == 0.1 and float(rows[1]["wire_bytes"]) == 4000
    _, out, _ = said([str(tmp_path), "--format=markdown", "sort=given"], capsys)
    assert "| 1 | a: precision=fp32 |" in out and "b\\|c" in out
    for bad, why in (
        (["--format", "xml"], "--format=xml: must be one of csv, json, markdown"),
        (["sort=size"], "sort=size: must be one of tokens, time"),
        (["colour=red"], "colour=red: compare takes RUN"),
        ([], "compare takes at least one run"),
    ):
        status, out, err = said([*([str(tmp_path)] if bad else []), *bad], capsys)
        assert status == 2 and why in err and out == "" and err.count("\n") == 1


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "a")
    a_run(tmp_path / "b", {"precision": "bf16"}, step_s=0.05)
    out = tmp_path / "pictures"
    status, _, _ = said([str(tmp_path / "a"), str(tmp_path / "b"), f"out={out}"], capsys)
    assert status == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        f"{n}.{s}" for n in ("memory", "time", "bytes", "loss") for s in ("png", "svg")
    }
    memory, loss = (out / "memory.svg").read_text(), (out / "loss.svg").read_text()
    for words in ("activations", "1 precision=fp32", "2 precision=bf16", "1.50 kB"):
        assert words in memory, words
    assert "seconds of training" in loss and "steps" in loss
    (tmp_path / "file").touch()
    status, _, err = said([str(tmp_path / "a"), f"out={tmp_path / 'file'}"], capsys)
    assert status == 2 and "out=" in err


def test_what_a_ledger_does_not_say_differs_from_nothing(tmp_path: Path) -> None:
    a_run(tmp_path / "a")
    a_run(tmp_path / "b", {"timeout_s": 5.0, "new_key": 1})
    found = differences_of(find_runs([str(tmp_path)])[0])
    assert found.keys == [] and found.elementary == [] and found.repeats == [[0, 1]]


def test_it_starts_without_what_takes_long() -> None:
    code = "import sys, experiments.__main__, experiments.compare.command; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"torch", "hydra", "omegaconf", "matplotlib", "wandb", "plotly"}
    assert not slow & set(done.stdout.split())
