"""./launch.sh score: published rows as plans, what it says of them, and files that are bad."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.predict import clusters
from experiments.predict.score import ROWS, Scored, score
from parallel.layout import ActivationCheckpointing
from simulator.candidates import schedule_of
from simulator.cells import Unknown
from simulator.fit import Problem, fit
from simulator.habits import FORWARD_ONLY, FUSED_LOGIT, MEGATRON_LOGIT
from simulator.plans import CHECKPOINTING
from simulator.published import network_rate, read
from simulator.score import feasibility, summary

KNOWN = clusters.load_all()


@pytest.fixture(scope="module")
def scored() -> Scored:
    return score(ROWS)


def cells(name: str) -> dict[str, str]:
    with open(ROWS, newline="") as file:
        return next(row for row in csv.DictReader(file) if row["id"] == name)


def write(path: Path, *rows: dict[str, str]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_errors_stay_below_what_the_document_says(scored: Scored) -> None:
    said = scored.said()
    assert said["time"]["macro_mape"] < 0.065
    assert said["memory"]["macro_mape"] < 0.08
    assert said["time"]["rows"] == 422 and len(said["time"]["sources"]) == 19
    assert said["feasibility"]["ran_above_limit"] == 0
    assert said["feasibility"]["predicted_not_to_fit"] >= 5


def test_megatrons_tables_on_a100_are_within_a_twentieth(scored: Scored) -> None:
    """Narayanan et al. 2021, tables 1 and 2; Korthikanti et al. 2022, table 5; those of 2020."""
    sources = scored.said()["time"]["sources"]
    own = [sources[name] for name in ("ptdp", "kort", "meg20")]
    assert sum(one["mape"] * one["rows"] for one in own) / sum(one["rows"] for one in own) < 0.05


def test_rows_without_a_plan_are_named_with_their_reason(tmp_path: Path) -> None:
    unheard = {**cells("mb-005"), "id": "mb-1", "model_name": "Babel 7B"}
    other = {**cells("mb-005"), "id": "mb-2", "n_layer": "72"}
    rows, unknown = read(write(tmp_path / "rows.csv", unheard, other), KNOWN)
    assert not rows and set(unknown) == {"mb-1", "mb-2"}
    assert "the shape of the experts of Babel 7B is not known" in unknown["mb-1"]
    assert "n_params=1.17e+11: the shape of GPT OSS 120B" in unknown["mb-2"]


def test_every_published_row_is_expressed(scored: Scored) -> None:
    assert scored.not_expressed == {}


def test_a_row_becomes_the_plan_that_it_describes(tmp_path: Path) -> None:
    """Korthikanti et al. 2022, table 5: 530B on 280 A100, tp 8, pp 35, three stages a rank."""
    rows, _ = read(write(tmp_path / "rows.csv", cells("kort-006")), KNOWN)
    row, plan = rows[0], rows[0].candidates[0].plan
    assert (row.source, row.cluster, row.seconds) == ("kort", "a100_80g", 37.83)
    assert (plan.tp[0], plan.pp[0], plan.local_stages[0], plan.micro_batches[0]) == (8, 35, 3, 280)
    assert CHECKPOINTING[plan.checkpointing[0]] == ActivationCheckpointing.selective
    assert plan.model.parameters == pytest.approx(529.6e9, rel=0.01)
    assert not plan.flash and plan.sequence_parallel[0]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("kort-006", (1,) * 105),
        ("llama3-002", (7, *(8,) * 14, 7)),  # one less at both ends (section 3.3.2)
        ("bs-127", (6, *(7,) * 10, 6)),  # embedding and head count as layers
        ("nt-013", None),  # nanotron balances flops, head included
        ("tt-001", None),
    ],
)
def test_stages_are_cut_as_their_programs_cut_them(
    tmp_path: Path, name: str, split: tuple[int, ...] | None
) -> None:
    rows, _ = read(write(tmp_path / "rows.csv", cells(name)), KNOWN)
    plans = [candidate.plan for candidate in rows[0].candidates]
    own = next(plan for plan in plans if name.startswith("kort") or plan.local_stages[0] == 1)
    assert own.split == split


@pytest.mark.parametrize(
    ("name", "habits"),
    [
        ("kort-005", {"hides_gradients": False, "logit_bytes": MEGATRON_LOGIT}),
        ("ptdp-021", {"hides_gathers": False}),
        ("mpt-001", {"kernel": "triton", "hides_tensor": 0.0}),
        ("megh-001", {"kernel": "fused", "hides_tensor": 1.0, "hides_updates": True}),
        ("sx-026", {"kernel": "fused", "hides_tensor": 0.0, "hides_gradients": False}),
        ("nemo-005", {"logit_bytes": FUSED_LOGIT, "hides_stages": True}),
        ("nt-013", {"copied_tensors": 6, "sends_once": False}),
        ("mb-008", {"sends_once": True, "graphs": True}),
        ("mb-238", {"sends_once": True, "graphs": False}),  # release 25.11
        ("tt-001", {"separate": True, "kernel": "flash2"}),
        ("tt-002", {"separate": False, "logit_bytes": FUSED_LOGIT}),
        ("tt-025", {"hides_tensor": 0.0}),  # "vanilla TP"
        ("tt-026", {"hides_tensor": FORWARD_ONLY}),  # "async TP"
        ("bs-131", {"blocking": True}),  # 384 GPUs
        ("bs-003", {"blocking": False}),  # 160
    ],
)
def test_habits_are_those_of_the_program(
    tmp_path: Path, name: str, habits: dict[str, object]
) -> None:
    rows, _ = read(write(tmp_path / "rows.csv", cells(name)), KNOWN)
    own = vars(rows[0].candidates[0].others["habits"])
    assert {key: own[key] for key in habits} == habits


def test_what_a_row_leaves_open_is_tried(tmp_path: Path) -> None:
    rows, _ = read(write(tmp_path / "rows.csv", cells("megh-001")), KNOWN)
    sizes = {candidate.plan.micro_batch_size[0] for candidate in rows[0].candidates}
    assert sizes == {1, 2, 4}
    assert {candidate.others["recomputed"] for candidate in rows[0].candidates} >= {0.0, 1.0}


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("4x100Gb Omni-Path/node", 6.25e9),
        ("1600Gbps/node RoCE", 25e9),
        ("400Gb/s/GPU RDMA", 50e9),
        ("EFA 3200Gb/s/node", 50e9),
        ("1.6 Tb/s", 25e9),
        ("", None),
        ("Omni-Path", None),
    ],
)
def test_the_network_of_a_row(text: str, rate: float | None) -> None:
    assert network_rate(text, 8) == rate


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n_layer": "many"}, "n_layer=many: not a number"),
        ({"n_layer": ""}, "n_layer is not stated"),
        ({"n_layer": "2"}, "n_layer(2) is less than pp(35) * vpp(3)"),
        ({"n_gpus": "281"}, "dp(1) * tp(8) * pp(35) * cp(1) != 281 ranks"),
        ({"gpu": "Abacus"}, "gpu=Abacus: not in configs/cluster"),
        ({"dp_kind": "zero9"}, "dp_kind=zero9: must be one of"),
        ({"recompute": "some"}, "recompute=some: must be none, selective or full"),
        ({"pp_schedule": "chimera"}, "pp_schedule=chimera: must be one of gpipe, 1f1b"),
        ({"status": "lost"}, "status=lost: must be ok or oom"),
        ({"n_layer": "1e7"}, "n_layer=1e+07: must be whole, at most 10,000"),
        ({"flash_attn": "maybe"}, "flash_attn=maybe: must be True or False"),
        ({"n_head": "7"}, "model.d_model=20480 % model.n_head=7"),
        ({"step_time_s": "-1"}, "step_time_s=-1: must be greater than 0"),
        ({"seq_len": "nan"}, "seq_len=nan: must be greater than 0"),
    ],
)
def test_a_bad_cell_costs_its_row_only(tmp_path: Path, change: dict[str, str], reason: str) -> None:
    good, bad = cells("kort-006"), {**cells("kort-005"), **change}
    rows, unknown = read(write(tmp_path / "rows.csv", good, bad), KNOWN)
    assert [row.name for row in rows] == ["kort-006"]
    assert list(unknown) == ["kort-005"] and reason in unknown["kort-005"]


@pytest.mark.parametrize("name", ["kort-006", "mb-096"])
def test_no_cell_is_a_traceback(tmp_path: Path, name: str) -> None:
    """Each column in turn has each of these: the row has a time and a size, or a reason."""
    odd = ("", "0", "x", "3", "1e30")
    good = cells(name)
    changes = [(key, value) for key in good for value in odd if key not in ("id", "use")]
    rows = [{**good, key: value, "id": f"a-{i}"} for i, (key, value) in enumerate(changes)]
    known, unknown = read(write(tmp_path / "rows.csv", *rows), KNOWN)
    assert len(known) + len(unknown) == len(rows) and known and unknown
    problem = Problem(known, KNOWN)
    for values in (problem.predict(), problem.memory()):
        assert np.isfinite(values).all() and (values > 0).all()


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("Interleaved1F1B", "interleaved_1f1b"),
        ("interleaved-1f1b", "interleaved_1f1b"),
        ("GPipe", "gpipe"),
        ("ZBVZeroBubble", "zbv_zero_bubble"),
        ("zero-bubble", None),
    ],
)
def test_schedules_by_the_names_that_programs_give_them(text: str, schedule: str | None) -> None:
    row = {"pp_schedule": text}
    if schedule is None:
        with pytest.raises(Unknown):
            schedule_of(row, 1)
    else:
        assert schedule_of(row, 1).value == schedule


def test_another_file_may_have_other_sources_and_fewer_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = "id gpu n_gpus n_layer d_model n_head d_ff ffn_kind vocab seq_len global_batch_seqs tp"
    row = {key: value for key, value in cells("kort-001").items() if key in keep.split()}
    file = write(tmp_path / "rows.csv", {**row, "id": "mine-1", "step_time_s": "1.4"})
    assert main(["score", f"rows={file}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) >= {"time", "memory", "not_expressed"}
    assert set(said["time"]) == {"macro_mape", "rows", "sources"}
    assert set(said["time"]["sources"]["mine"]) == {"rows", "mape", "median", "p90", "bias"}
    assert said["memory"] == {"macro_mape": None, "rows": 0, "sources": {}}


def test_bad_files_and_keys_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, binary = tmp_path / "empty.csv", tmp_path / "binary.csv"
    empty.write_text("a,b\n1,2\n")
    binary.write_bytes(b"\xff\xfe\x00id")
    for argument, status, text in [
        (f"rows={empty}", 2, "no column id, gpu"),
        (f"rows={binary}", 2, "not a CSV"),
        (f"rows={tmp_path / 'none.csv'}", 2, "No such file"),
        ("row=x.csv", 2, "row=x.csv: score takes rows=FILE"),
    ]:
        assert main(["score", argument]) == status
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1


def test_summary_weighs_sources_alike() -> None:
    predicted, measured = np.array([1.1, 1.1, 1.1, 0.7]), np.ones(4)
    said = summary(predicted, measured, ["a", "a", "a", "b"])
    assert said["macro_mape"] == pytest.approx(0.2)
    assert said["sources"]["b"]["bias"] == pytest.approx(-0.3)
    needed, failed = np.array([50.0, 79.0, 90.0, 85.0]), np.array([True, True, False, False])
    assert feasibility(needed, np.full(4, 80.0), failed) == {
        "out_of_memory": 2,
        "predicted_not_to_fit": 1,
        "ran": 2,
        "ran_above_limit": 1,
    }


def test_the_fit_finds_the_numbers_that_made_the_times(scored: Scored) -> None:
    rows = [row for row in scored.rows if row.source in ("kort", "meg20")]
    problem = Problem(rows, KNOWN)
    slower = KNOWN | {
        name: KNOWN[name].changed({"device.efficiency.matmul": 0.5})
        for name in ("a100_40g", "a100_80g")
    }
    problem.measured = Problem(rows, slower).predict()
    before = np.abs(problem.predict() / problem.measured - 1).mean()
    fit(problem, np.ones(len(rows), dtype=bool), rounds=8)
    after = np.abs(problem.predict() / problem.measured - 1).mean()
    assert before > 0.2 and after < 0.05
