"""docs/results/gpu.md's figures, on a core: the way to them, not the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.calibrate import device_times
from experiments.config import Device
from experiments.environment import gpu_count
from experiments.figures import gpu_report
from experiments.figures.gpu_report import Figures, document, gpt2
from experiments.predict import clusters
from minigpt.config import DataConfig, ModelConfig, Source
from parallel.layout import Precision
from simulator.formula_ledger import formula_steps


def figures() -> Figures:
    """Ours takes 100 ms and is predicted to take 90, the plain loop 110; operator by operator 125,
    predicted 120."""
    predicted = {"time_s": {"total": 0.12}, "memory_bytes": {"peak": 10 * 2**30}}
    return Figures(
        device="a GPU",
        peak=5e14,
        tokens=16384,
        flops=1.4e13,
        ours_s=[0.1, 0.09, 0.2],
        plain_s=[0.11, 0.11, 0.11],
        compiled_bytes=9 * 2**30,
        eager_s=0.125,
        eager_bytes=10 * 2**30,
        allocator_bytes=8 * 2**30,
        predicted=predicted,
        predicted_compiled_s=0.09,
    )


def test_the_document_says_what_was_measured_and_predicted() -> None:
    text = document(figures())
    assert "| worldsize, compiled | 100.0 | 90.0 to 200.0 | 163,840 | 28.0% |" in text
    assert "worldsize is 1.100 times as fast as the plain loop (bar: 1.0;" in text
    assert "| step, operator by operator, ms | 125.00 | 120.00 | -4.0% | 10% |" in text
    assert "| step, compiled, ms | 100.00 | 90.00 | -10.0% | 10% |" in text
    assert "| peak memory by the meters, GiB | 10.00 | 10.00 | +0.0% | 3% |" in text
    assert "| peak memory by the allocator, GiB | 8.00 | 10.00 | **+25.0%** | 3% |" in text
    assert "| the same, compiled, GiB | 9.00 |" in text and "500 TFLOP/s" in text


def test_it_is_gpt2_of_124_million_parameters() -> None:
    assert gpt2().model.parameters == 124_373_760  # nanoGPT's, with its positions


def test_the_closed_forms_are_near_what_that_machine_took() -> None:
    """docs/results/gpu.md's steps and meters, by the profile that its machine had."""
    config, cluster = gpt2(), clusters.load("h200_measured")
    (step,) = formula_steps(config.model, config.layout, config.options, cluster)
    assert step["time_s"]["total"] == pytest.approx(0.05068, rel=gpu_report.TIME_BAR)
    compiled = gpu_report.compiled_seconds(config, cluster)
    assert compiled == pytest.approx(0.03382, rel=gpu_report.TIME_BAR)
    peak = step["memory_bytes"]["peak"]
    assert peak == pytest.approx(17_154_090_608, rel=gpu_report.MEMORY_BAR)


@pytest.mark.slow
def test_the_figures_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("EAGER_STEPS", 8), ("WARMUP", 4), ("ROUNDS", 2), ("TURN", 2)):
        monkeypatch.setattr(gpu_report, name, value)
    heads = ((1, 2, 16, 64), (1, 2, 16, 128))
    few = device_times.Sizes(((16, 16, 16), (64, 32, 64)), (2**12, 2**18), heads, ((64, 32),))
    monkeypatch.setitem(device_times.SIZES, "cpu", few)
    model = ModelConfig(n_layer=2, n_head=2, d_model=32, vocab_size=96, context=32)
    config = replace(
        gpt2(2),
        model=model,
        data=DataConfig(source=Source.random, vocab_size=96, tokens=5000),
        seq_len=32,
        compile=False,
        precision=Precision.fp32,  # whose attention is a flash kernel on a core too
        device=Device.cpu,
    )
    found = gpu_report.measure(config, torch.device("cpu"))
    assert len(found.ours_s) == len(found.plain_s) == 2
    assert found.tokens == 64 and found.allocator_bytes is None
    assert found.eager_bytes == pytest.approx(found.predicted["memory_bytes"]["peak"], rel=0.03)
    text = document(found)
    assert "by the meters" in text and "allocator" not in text


@pytest.mark.skipif(gpu_count() > 0, reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main() == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "no CUDA device" in said.err
