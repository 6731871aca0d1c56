"""./launch.sh simulate: a ledger that the schema takes, a verdict, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from costs import ledger as ledgers
from costs import trace as traces
from costs.program import Message
from costs.trace import COMPUTE
from experiments.__main__ import main
from experiments.compare.comparison import compared
from experiments.compose import CONFIGS
from experiments.overrides import composed
from experiments.pictures import COLOURS, NAMES
from experiments.predict.clusters import load
from experiments.predict.simulate import MOST_EVENTS, drawn_timeline
from minigpt.config import ModelConfig
from parallel.layout import ActivationCheckpointing, GradientSync, Layout, Options
from simulator.communication import payload_bytes
from simulator.formula_ledger import formula_steps, stride
from simulator.plan_programs import event_count, programs_of
from simulator.verdict import verdict

PLAN = ["layout.tp=2", "layout.pp=2", "layout.dp_shard=2", "gradient_accumulation_steps=4"]


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["simulate", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_sweep_of_simulations_can_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    swept = ["cluster=h100,a100_80g", "precision=bf16,fp32", "run.dir=swept"]
    status, _, error = said(["-m", *PLAN, *swept], capsys)
    assert (status, error) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["swept"], "Hydra leaves nothing"
    comparison = compared(["swept"])
    assert [run.name for run in comparison.runs] == ["0", "1", "2", "3"]
    found = {tuple(d.keys): d for d in comparison.differences.elementary}
    assert found[("precision",)].pairs == [(0, 1), (2, 3)]
    assert found[("cluster",)].pairs == [(0, 2), (1, 3)]
    assert found[("cluster",)].after == {"cluster": "a100_80g"}


def test_the_ledger_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    argv = [*PLAN, "model=llama3_8b", "cluster=h100", f"run.dir={folder}", "--json"]
    status, text, _ = said([*argv, "scale.tokens=chinchilla", "scale.price=2"], capsys)
    ledger = json.loads(text)
    assert status == 0 and ledger == ledgers.read(folder / "ledger.json")
    assert ledger["source"] == "formula" and len(ledger["ranks"]) == 2
    assert ledger["environment"]["verdict"].startswith(("fits", "does not fit"))
    end = ledger["environment"]["to_the_end"]
    assert end["tokens"] == 20 * ledger["model"]["parameters"]
    assert end["cost"] == pytest.approx(2 * end["device_hours"])


def test_its_bytes_are_the_closed_form() -> None:
    model, layout = ModelConfig(), Layout(pp=2, dp_shard=2, tp=2)
    options = Options(micro_batch_size=2, seq_len=64, micro_batches=4)
    for place, step in enumerate(formula_steps(model, layout, options, load("h100"))):
        sent: dict[tuple[str, str, str], int] = {}
        for row in step["communication"]:
            key = row["collective"], row["axis"], row["dtype"]
            sent[key] = sent.get(key, 0) + row["payload_bytes"]
        assert sent == payload_bytes(model, layout, options, place=place)


@pytest.mark.parametrize(
    ("axis", "apart"),
    [("tp", 1), ("cp", 2), ("dp_shard", 6), ("dp_shard*cp", 2), ("pp", 60), ("ep", 6)],
)
def test_neighbours_of_an_axis_are_so_many_ranks_apart(axis: str, apart: int) -> None:
    layout = Layout(pp=2, dp_replicate=2, dp_shard=5, cp=3, tp=2, ep=5)
    assert stride(axis, layout) == apart


def test_what_ep_leaves_of_an_axis_lies_outside_of_ep() -> None:
    assert stride("dp_shard/ep", Layout(dp_shard=8, ep=4)) == 4


def test_the_verdict_names_what_to_change_first() -> None:
    """Recomputation where activations overflow, more micro-batches where the bubble is large."""
    model = ModelConfig(
        n_layer=32,
        n_head=32,
        n_kv_head=8,
        d_model=4096,
        d_ff=14336,
        vocab_size=128256,
        context=8192,
    )
    h100 = load("h100")

    def of(layout: Layout, memory: float = h100.device.memory_bytes, **options: Any) -> str:
        made = Options(micro_batch_size=1, seq_len=8192, **options)
        steps = formula_steps(model, layout, made, h100)
        return verdict(steps, layout, made, memory)

    overflows = of(Layout(dp_shard=64), micro_batches=1)
    assert "does not fit" in overflows and "activations" in overflows
    assert "activation_checkpointing=selective" in overflows
    full = ActivationCheckpointing.full
    bubbles = of(Layout(pp=8, tp=4), micro_batches=8, activation_checkpointing=full)
    assert "bubble takes" in bubbles and "gradient_accumulation_steps" in bubbles
    several = {"memory": 25e9, "micro_batches": 4, "activation_checkpointing": full}
    whole, shards = (of(Layout(dp_shard=64), gradient_sync=s, **several) for s in GradientSync)
    assert "does not fit" in whole and "first try gradient_sync=micro_batch" in whole
    assert shards.startswith("fits"), "what the verdict says first is enough"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["cluster=abacus"], "cluster=abacus: no such option"),
        ([f"cluster={__file__}"], "is a file, and cluster takes the name of one in configs/clus"),
        (["layout.dp_shard=-1", "layout.tp=2", "gpus=5"], "layout.dp_shard=-1: 5 ranks / "),
        (["layout.dp_shard=2", "gpus=4"], "= 2 != 4 ranks"),
        (["gpus=0"], "gpus=0: must be at least 1"),
        (["headroom=1"], "headroom=1.0: must be at least 0 and below 1"),
        (["rank=3"], "rank=3: the layout has 1 ranks"),
        (["rank=0"], "rank=0: method=formula gives all ranks"),
        (["impl=by_hand", "precision=fp32"], "impl=by_hand: only impl=torch is simulated"),
        (["compile=true"], "compile=true: a compiled step is not simulated"),
        (["layout.tp=3"], "layout.tp=3: model.n_head(4) % tp(3)"),
        (["scale.tokens=1e300"], "must be a number above 0 and at most 1e+18"),
        (["layout.dp_replicate=100000000000000000000"], "a simulated world has 1 to 1,000,000,000"),
        (["layout.dp_replicate=2000000", "method=trace"], "method=trace has 1 to 65,536"),
        (["gradient_accumulation_steps=100000000000"], "a rank has"),
        (["scale.tokens=many"], "scale.tokens=many: must be a number above 0"),
        (["cluster.device.memory_bytes=0"], "device.memory_bytes=0"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = said([*argv, f"run.dir={tmp_path / 'run'}"], capsys)
    assert status == 2 and out == "" and says in err and err.count("\n") == 1


@pytest.mark.parametrize("strategy", sorted(p.stem for p in (CONFIGS / "strategy").glob("*")))
def test_every_strategy_preset_is_simulated_or_refused_in_a_line(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"strategy={strategy}", "model.dropout=0", f"run.dir={tmp_path / 'run'}"]
    status, out, err = said([*argv, "--json"], capsys)
    if strategy in ("accelerate", "ep"):  # another program; a model that has no experts
        assert (status, out) == (2, "") and err.count("\n") == 1
        return
    assert (status, err) == (0, "")
    sizes = json.loads(out)["layout"]
    named = {"ddp": "dp_replicate", "fsdp": "dp_shard", "zero1": "dp_shard", "zero2": "dp_shard"}
    if strategy in named:
        assert sizes[named[strategy]] == sizes["world_size"] == load("h100").node_size


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (CONFIGS / "experiment").glob("*")))
def test_every_experiment_is_simulated_or_refused_in_a_line(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"experiment={experiment}", f"run.dir={tmp_path / 'run'}", "--json"]
    status, out, err = said(argv, capsys)
    if experiment == "gpt2":
        assert (status, out) == (2, "") and err.count("\n") == 1 and "compile=false" in err
        status, out, err = said([*argv, "compile=false"], capsys)
    assert (status, err) == (0, "") and json.loads(out)["step"]["time_s"]["total"] > 0


def test_minus_one_is_what_the_other_axes_leave_of_a_node_or_of_gpus() -> None:
    for given, ranks in ((("gpus=16",), 16), ((), 8), (("cluster=gb200_nvl72",), 72)):
        config = composed("simulate", ("strategy=fsdp", "layout.tp=2", *given))
        assert (config.layout.dp_shard, config.layout.world_size) == (ranks // 2, ranks)
    wide = composed("simulate", ("strategy=ddp", "layout.dp_shard=16"))
    assert wide.layout.world_size == 16, "more than a node where the other axes take more"


def drawn(folder: Path) -> dict[str, float]:
    """Seconds of each kind on rank 0 that the timeline of a simulation draws and names."""
    svg, seconds = (folder / "timeline.svg").read_text(), Counter[str]()
    for piece in traces.read(folder / "trace.json.gz").slices:
        if piece.rank == 0 and piece.track == COMPUTE and piece.kind in COLOURS:
            seconds[piece.kind] += piece.end - piece.start
            assert COLOURS[piece.kind] in svg and f">{NAMES.get(piece.kind, piece.kind)}<" in svg
    return dict(seconds)


def test_a_timeline_is_drawn_of_what_is_computed(tmp_path: Path) -> None:
    plan = ["layout.pp=2", "gradient_accumulation_steps=4", "pipeline.schedule=zbv_zero_bubble"]
    argv = [*plan, "model=gpt2", "cluster=h100", "trace=true", f"run.dir={tmp_path}", "--json"]
    assert main(["simulate", *argv]) == 0
    step = ledgers.read(tmp_path / "ledger.json")["step"]["time_s"]
    seconds = drawn(tmp_path)
    assert seconds.keys() == {"forward", "backward_input", "backward_weight", "optimizer"}
    assert sum(seconds.values()) == pytest.approx(step["compute"] + step["optimizer"], rel=0.1)
    kinds = {p.kind for p in traces.read(tmp_path / "trace.json.gz").slices}
    assert {"qkv", "attention", "elementwise", "head"} <= kinds, "operators lie in the passes"


@pytest.mark.slow
def test_a_traced_step_has_the_same_bytes_and_times(tmp_path: Path) -> None:
    """Both methods, one plan: messages equal, and times that a replay gives."""
    plan = ["layout.pp=2", "gradient_accumulation_steps=2", "precision=fp32", "cluster=laptop"]
    found = {}
    for method in ("formula", "trace"):
        folder = tmp_path / method
        argv = [*plan, f"method={method}", f"run.dir={folder}", "trace=true", "--json"]
        assert main(["simulate", *argv]) == 0
        assert drawn(folder).keys() >= {"forward", "backward", "optimizer"}
        found[method] = ledgers.read(folder / "ledger.json")
    rows = {
        method: {
            (r["collective"], r["axis"], r["dtype"], r["phase"]): (r["calls"], r["payload_bytes"])
            for r in ledger["ranks"][0]["communication"]
        }
        for method, ledger in found.items()
    }
    assert rows["formula"] == rows["trace"]
    assert found["trace"]["source"] == "traced"
    assert found["trace"]["step"]["time_s"]["total"] > 0


LARGEST = (
    *("model=llama3_70b", "cluster=b300", "seq_len=128", "micro_batch_size=8"),
    *("gradient_accumulation_steps=32", "activation_checkpointing=full"),
    *("layout.pp=32", "layout.cp=8", "layout.tp=4", "layout.dp_replicate=256"),
    "layout.dp_shard=512",
)


def test_a_timeline_has_few_events_however_large_the_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """134 million ranks, each of which would have 10,000 events, operator by operator."""
    config = composed("simulate", LARGEST)
    assert config.layout.world_size == 2**27
    timeline = drawn_timeline(config)
    stages = range(0, 2**27, 2**27 // 32)
    assert sorted(timeline.programs) == list(stages)
    passes = 2 * 32 * 32  # forward and backward of 32 micro-batches on 32 stages
    events = sum(map(len, timeline.programs.values()))
    # with each pass a message that comes, one that goes and a wait for each; an optimizer a stage
    assert passes <= events <= 5 * passes + 32 < MOST_EVENTS
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "an event for each pass" in line


@pytest.mark.parametrize("more", [(), ("pipeline.schedule=interleaved_1f1b",), ("layout.pp=1",)])
def test_the_events_of_a_plan_are_counted_before_they_are_made(more: tuple[str, ...]) -> None:
    config = composed(
        "simulate", ("model=gpt2", "model.pad_vocab_to=50304", "cluster=h100", *PLAN, *more)
    )
    plan = (config.model, config.layout, config.options)
    programs = programs_of(*plan)[0].values()
    events = [event for program in programs for event in program]
    between = sum(isinstance(event, Message) and event.axis == "pp" for event in events)
    made = len(events) - 2 * between  # each has its wait
    assert 0.9 * made < event_count(*plan) < 1.1 * made
