"""./launch.sh check: what it refuses, what it says of bars, what is predicted of what it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.__main__ import main
from experiments.calibrate.check import KINDS, Checked, configurations, said, show, simulated
from experiments.predict import clusters

REFUSED = [
    (["speed=2"], "speed=2: check takes cluster=NAME|FILE, --json"),
    (["cluster="], "cluster=: check takes cluster=NAME|FILE, --json"),
    (["cluster=moon.yaml"], "cluster=moon.yaml: no such option; allowed: a100_40g,"),
]


@pytest.mark.parametrize("argv,line", REFUSED, ids=[line[:12] for _, line in REFUSED])
def test_bad_input_is_one_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, captured = main(["check", *argv]), capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert captured.err.startswith(f"launch.sh: {line}") and captured.err.count("\n") == 1


def near(name: str = "ddp") -> Checked:
    """Predicted 10 % too long, 2 % too full; by formula 20 % too long."""
    return Checked(name, configurations()[name], 1.0, 1.1, 1.2, 1000, 1020, 1030)


def test_what_misses_its_bar_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    show([near()])
    assert "traced times are within 15%" in capsys.readouterr().out
    show([near(), replace(near("tp"), traced_s=0.8, traced_bytes=900)])
    out = capsys.readouterr().out
    assert "tp: time -20.0%, not within 15%" in out
    assert "tp: memory -10.0%, not within 3%" in out and "ddp: time" not in out


def test_json_has_what_scripts_read() -> None:
    found = said(near())
    assert found["layout"] == "ddp"
    assert (found["measured_time_s"], found["predicted_time_s"]) == (1.0, 1.1)
    assert found["time_error"] == pytest.approx(0.1)
    assert found["memory_error"] == pytest.approx(0.02)


def test_what_is_predicted_is_what_runs() -> None:
    laptop = clusters.load("laptop")
    assert set(configurations()) == set(KINDS)
    for config in configurations().values():
        plan = simulated(config, laptop)
        assert (plan.model, plan.layout, plan.options) == (
            config.model,
            config.layout,
            config.options,
        )
        assert plan.batch_size == 8 and plan.layout.world_size <= 2
