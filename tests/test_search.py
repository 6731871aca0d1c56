"""What a search finds: against brute force, under better and worse clusters, and as it is said."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.compose import configs_of
from experiments.overrides import composed
from experiments.predict.clusters import load
from experiments.predict.search_picture import draw
from experiments.predict.search_tables import broken, thinned
from experiments.predict.verify import compare_bytes, options_at_twin, twin_of
from experiments.refused import Refused
from minigpt.config import ModelConfig
from parallel.layout import ActivationCheckpointing, GradientSync, Precision
from simulator.hardware import Cluster
from simulator.memory import memory
from simulator.search import (
    CLOSE,
    LOSSES,
    OUT_OF_MEMORY,
    RECOMPUTES,
    SMALL_TILES,
    Found,
    count_axes,
    predict,
    search,
)
from simulator.space import Space, layout_at

MODEL = ModelConfig(
    n_layer=16, n_head=16, n_kv_head=8, d_model=2048, vocab_size=32000, context=2048
)
SPACE = Space(MODEL, 2048, 16, 64, micro_batch_sizes=(1, 2, 4))
NONE = ActivationCheckpointing.none
SMALL = ["search", "model=llama3_8b", "cluster=h100", "gpus=16", "global_batch_tokens=512k"]
LLAMA = ["search", "model=llama3_405b", "cluster=h100", "gpus=16384", "global_batch_tokens=16M"]


def cluster(memory: float = 24e9, faster: float = 1.0) -> Cluster:
    """configs/cluster/h100.yaml with less memory, or another network between nodes."""
    h100 = load("h100")
    bandwidth = h100.between_nodes.bandwidth * faster
    return h100.changed({"device.memory_bytes": memory, "between_nodes.bandwidth": bandwidth})


def fastest(found: Found) -> float:
    return float(found.predicted.time_s["total"][found.order[0]])


@pytest.fixture(scope="module")
def found() -> Found:
    return search(SPACE, cluster(), 0.1)


def test_the_winner_is_the_fastest_that_fits(found: Found) -> None:
    time, peak = found.predicted.time_s["total"], found.predicted.memory_bytes["peak"]
    fitting = [i for i in range(len(time)) if peak[i] <= found.limit]
    assert 100 < len(fitting) < len(time)
    assert fastest(found) <= min(time[i] for i in fitting) * 1.001
    assert sorted(found.order.tolist()) == fitting


def test_what_does_not_fit_is_not_timed_and_what_fits_is_as_if_all_were(found: Found) -> None:
    every, time = predict(found.predicted.plans, found.cluster).time_s, found.predicted.time_s
    known = found.fits | found.exact
    assert found.fits.any() and not known.all()
    for part, seconds in time.items():
        assert np.array_equal(seconds[known], every[part][known])
        assert np.isnan(seconds[~known]).all()
    large = np.flatnonzero(~known)
    i = found.best_of(large)
    assert i in large and time["total"][i] == every["total"][i], "what is asked for is timed"


def test_the_simplest_has_fewest_axes_of_what_is_nearly_as_fast(found: Found) -> None:
    plans, time = found.predicted.plans, found.predicted.time_s["total"]
    chosen = found.simplest()
    assert chosen is not None and found.fits[chosen]
    near = np.flatnonzero(found.fits & (time <= (1 + CLOSE) * fastest(found)))
    fewest = count_axes(plans[near]).min()
    assert count_axes(plans[[chosen]]) == fewest < count_axes(plans[near]).max()
    as_few = near[count_axes(plans[near]) == fewest]
    assert time[chosen] <= 1.001 * time[as_few].min()
    assert search(SPACE, cluster(1e9), 0.1).simplest() is None


def test_shards_of_gradients_let_a_faster_plan_fit() -> None:
    """FSDP alone on little memory: whole gradients of several micro-batches leave no room."""
    fixed = {"pp": 1, "tp": 1, "cp": 1}
    both = replace(SPACE, fixed=fixed, batch_size=256, checkpointing=(NONE,))
    once = replace(both, gradient_syncs=(GradientSync.step,))
    found, without = (search(space, cluster(10e9), 0.1) for space in (both, once))
    assert found.predicted.plans.syncs_each[found.order[0]]
    assert fastest(found) < fastest(without)


def test_what_is_shown_fits_on_every_rank(found: Found) -> None:
    plans, peak = found.predicted.plans, found.predicted.memory_bytes["peak"]
    for i in {*found.order[:100].tolist(), *found.front().tolist()}:
        one = plans[[i]]
        ranks = [memory(one, place).peak[0] for place in range(int(one.pp[0]))]
        assert peak[i] == max(ranks) <= found.limit


def test_the_best_of_some_is_judged_by_all_its_ranks(found: Found) -> None:
    """What explain= sets beside the winner."""
    plans = found.predicted.plans
    for pp in (4, 8, 16):
        i = found.best_of(np.flatnonzero(plans.pp == pp))
        one, peak = plans[[i]], found.predicted.memory_bytes["peak"][i]
        assert peak == max(memory(one, place).peak[0] for place in range(pp))


def test_why_no_plan_is_left_is_said() -> None:
    with pytest.raises(ValueError, match=r"no plan is left; refused: .* by layout.tp: not within"):
        search(replace(SPACE, fixed={"tp": 8}), replace(cluster(), node_size=4), 0.1)
    with pytest.raises(ValueError, match=r"more stages than model.n_layer\("):
        search(replace(SPACE, fixed={"pp": 32}, devices=32), cluster(), 0.1)


def test_the_front_is_what_no_plan_beats(found: Found) -> None:
    time, peak = found.predicted.time_s["total"], found.predicted.memory_bytes["peak"]
    fitting, front = np.flatnonzero(found.fits), found.front()
    assert len(front) > 3 and found.fits[front].all()
    for i in fitting:
        no_worse = (time[fitting] <= time[i]) & (peak[fitting] <= peak[i])
        beaten = (no_worse & ((time[fitting] < time[i]) | (peak[fitting] < peak[i]))).any()
        twins = (time[front] == time[i]) & (peak[front] == peak[i])
        assert twins.any() != beaten


def test_every_plan_has_a_reason_to_lose(found: Found) -> None:
    reasons = found.reasons()
    kinds = {loss.replace("_", " ") for loss in LOSSES} | {RECOMPUTES, SMALL_TILES, OUT_OF_MEMORY}
    own = {name: n for name, n in reasons.items() if not name.startswith("refused: ")}
    assert own.keys() <= kinds and len(own) > 3
    assert sum(own.values()) == len(found.predicted) - 1
    winner = int(found.order[0])
    bubbles = [i for i in found.order[1:] if found.lost(np.array([i]), winner)[0] == "bubble"]
    assert bubbles and (found.predicted.time_s["bubble"][bubbles] > 0).all()


def test_better_clusters_never_make_it_slower(found: Found) -> None:
    slack = 1.001  # plans within a thousandth count as equally fast
    by_headroom = [fastest(search(SPACE, cluster(), share)) for share in (0.0, 0.2, 0.4)]
    by_memory = [fastest(search(SPACE, cluster(size), 0.1)) for size in (6e9, 12e9, 24e9)]
    by_network = [fastest(search(SPACE, cluster(24e9, rate), 0.1)) for rate in (0.1, 1.0, 4.0)]
    for slower, faster in zip(by_headroom[1:], by_headroom, strict=False):
        assert faster <= slower * slack
    for rising in (by_memory, by_network):
        assert rising[-1] < rising[0]
        assert all(b <= a * slack for a, b in itertools.pairwise(rising))


def test_one_value_is_taken_for_a_list_of_one() -> None:
    """Through Hydra and without it."""
    given = ("gpus=16", "micro_batch_size=2", "precision=fp32", "zero_stage=3", "schedule=1f1b")
    (composed_by_hydra,) = configs_of("search", list(given))
    assert composed("search", given) == composed_by_hydra
    assert composed_by_hydra.micro_batch_size == [2]
    assert composed_by_hydra.precision == [Precision.fp32]
    (split,) = configs_of("train", ["strategy=pp", "pipeline.split=[3,1]"])
    assert split.pipeline.split == [3, 1]
    with pytest.raises(Refused, match="micro_batch_size"):
        configs_of("search", ["micro_batch_size=two"])


def test_a_vocabulary_that_tp_does_not_divide_is_padded_and_said_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """GPT-2's 50257 ids are odd: without padding no plan has tp at all."""
    given = ("model=gpt2_medium", "cluster=h100", "gpus=8", "global_batch_tokens=64k", "top=500")
    for more, padded in (
        ((), 50304),
        (("model.pad_vocab_to=50257",), 50257),
        (("layout.tp=1",), None),
    ):
        assert main(["search", *given, *more, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["pad_vocab_to"] == padded
        sizes = {plan["layout"]["tp"] for plan in said["plans"]}
        assert (len(sizes) > 1) == (padded == 50304)
        assert padded is None or all(f"={padded} " in plan["command"] for plan in said["plans"])
    assert not composed("search", (*given, "model=tiny_moe")).odd_tensor_parallel
    assert main(["search", *given[:-1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(i for i, line in enumerate(lines) if "model.pad_vocab_to=50304" in line)
    assert place < lines.index(next(line for line in lines if line.startswith("the fastest")))


def test_json_has_what_scripts_read(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "top=3", "scale.tokens=1T", "scale.price=2", "explain=pp2-dp_shard4-tp2"]
    assert main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    plans = said["plans"]
    assert len(plans) == 3 and said["considered"] >= said["predicted"] > 1000
    for plan in [*plans, said["simplest"], *said["front"], said["explained"]["plan"]]:
        assert plan["fits"] and plan["micro_batch_size"] >= 1 and 0 < plan["mfu"] < 1
        assert plan["time_s"] == pytest.approx(sum(plan["time_parts"].values()))
        assert plan["memory_bytes"] == sum(plan["memory_parts"].values())
        assert set(plan["layout"]) == {"pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"}
        tokens = 1e6 / 2**19
        assert plan.get("cost_per_million_tokens", 2 * 16 * plan["time_s"] / 3600 * tokens) == (
            pytest.approx(2 * 16 * plan["time_s"] / 3600 * tokens)
        )
    assert "cost_per_million_tokens" in plans[0] and "cost_per_million_tokens" in said["simplest"]
    assert sum(said["rejected"].values()) == said["considered"] - 1
    lost = {name for name in said["rejected"] if not name.startswith("refused: ")}
    assert set(said["lost_by"]) == lost and all(by > 0 for by in said["lost_by"].values())
    end = said["to_the_end"]
    steps = 1e12 / 2**19
    assert end["steps"] == pytest.approx(steps) and 0.9 < end["goodput"] < 1
    assert end["time_s"] == pytest.approx(steps * plans[0]["time_s"] / end["goodput"])
    assert end["cost"] == pytest.approx(2 * 16 * end["time_s"] / 3600)


def test_a_winner_that_is_the_simplest_is_not_named_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = ["model=gpt2", "cluster=h100", "gpus=1", "global_batch_tokens=64k", "scale.price=2"]
    several = ["model=llama3_8b", "cluster=h100", "gpus=16", "global_batch_tokens=1M"]
    for argv, named in ((alone, False), (several, True)):
        assert main(["search", *argv]) == 0
        assert ("fewest axes" in capsys.readouterr().out) == named


def test_tables_fit_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "explain=pp2-dp_replicate2-dp_shard2-tp2", "scale.tokens=1T"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if line.startswith("./launch.sh simulate ")]
    assert commands  # each in one line, to be copied
    assert max(len(line) for line in lines if line not in commands) <= 100
    assert not any("\u2026" in line for line in lines)  # nothing is cut off
    assert any("device-hours" in line for line in lines)
    label = "pp16-dp_replicate16-dp_shard16-cp2-tp8"
    assert broken(label) == "pp16-dp_replicate16-\ndp_shard16-cp2-tp8"
    front = [{"time_s": 1 + i / 20, "memory_bytes": 100 - i} for i in range(40)]
    assert len(thinned(front)) == 13 and thinned(front)[0] is front[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("explain=pp3-tp4", "explain=pp3-tp4: the search has no such plan"),
        ("explain=xx3", "explain=xx3: xx3 is no axis"),
        ("gpus=0", "gpus=0"),
        ("global_batch_tokens=many", "global_batch_tokens=many"),
        ("global_batch_tokens=1k", "global_batch_tokens=1k"),
        ("scale.price=-1", "scale.price=-1"),
        ("layout.tp=3", "layout.tp=3"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], given: str, said: str) -> None:
    assert main([*SMALL, given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_known_layout_is_beside_the_winner(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3 405B on 16,384 H100: tp 8, pp 16 (Llama team 2024, table 4); a part of the space."""
    few = ["layout.tp=8", "layout.cp=1", "layout.dp_replicate=1", "micro_batch_size=[1]"]
    assert main([*LLAMA, *few, "explain=pp16-dp_shard128-tp8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    theirs, best = said["explained"]["plan"], said["plans"][0]
    assert theirs["label"] == "pp16-dp_shard128-tp8" and theirs["fits"]
    assert best["time_s"] <= theirs["time_s"] * 1.001
    assert (said["explained"]["loses_by"] is None) == (best["label"] == theirs["label"])


def test_the_picture_is_drawn(found: Found, tmp_path: Path) -> None:
    from experiments.predict.plan_config import SearchConfig

    config = SearchConfig(model=MODEL, cluster=cluster(), gpus=16, seq_len=2048)
    draw(found, config, tmp_path / "front.png")
    svg = (tmp_path / "front.svg").read_text()
    assert (tmp_path / "front.png").stat().st_size > 10_000 and "memory of the device" in svg


@pytest.mark.slow
def test_the_twin_keeps_the_layout_and_sends_the_closed_form(found: Found) -> None:
    i = int(found.order[0])
    layout = layout_at(found.predicted.plans, i)
    twin = twin_of(MODEL, layout, options_at_twin(found, i))
    assert twin.layout == layout and twin.model.d_model < 256
    traced = compare_bytes(twin)
    assert traced["payload_bytes"] > 0 and traced["differ"] == []
