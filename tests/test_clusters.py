"""configs/cluster: every file loads, each number has its source, bad numbers are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.calibrate.profile import yaml_of
from experiments.predict import clusters
from experiments.predict.fit import replaced
from experiments.refused import Refused
from simulator.hardware import Cluster, Device, Peak, numbers, tables
from simulator.published import GPUS

KINDS = ("datasheet", "measured:", "fitted:", "assumed:", "derived:", "set:")
ASKED_FOR = {
    *("laptop", "v100", "a100_40g", "a100_80g", "h100", "h200", "b200", "gb200_nvl72"),
    *("mi300x", "tpu_v5p", "ethernet_10g", "ethernet_100g"),
}


def test_the_library_has_what_was_asked_for() -> None:
    assert set(clusters.names()) >= ASKED_FOR
    assert set(GPUS.values()) <= set(clusters.names())


@pytest.mark.parametrize("name", clusters.names())
def test_each_number_of_a_cluster_has_a_source(name: str) -> None:
    cluster = clusters.load(name)
    assert cluster.name == name
    keys = [*(key for key, _ in numbers(cluster)), *tables(cluster)]
    assert set(keys) == set(cluster.sources)
    assert all(len(text) > 10 for text in cluster.sources.values())
    for key, text in cluster.sources.items():
        if "efficiency" in key or key in ("overlap", "operator_overhead", "straggling", "crowding"):
            assert text.startswith(KINDS[1:]), key


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    good = (clusters.FOLDER / "h100.yaml").read_text()
    file = tmp_path / "mine.yaml"
    for line, bad in [
        ("node_size: 8", "node_size: 0"),
        ("node_size: 8", "node_size: many"),
        ("node_size: 8", "node_sise: 8"),
        ("overlap: ", "overlap: 2"),
        ("  latency: 6.0e-6", "  latency: -1"),
    ]:
        assert line in good
        file.write_text(good.replace(line, bad, 1))
        with pytest.raises(Refused) as error:
            clusters.read(file)
        assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)
    for text in ("node_size: [", "- 8", "\0", "é".encode("latin1")):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(Refused, match=r"^mine.yaml: .+$"):
            clusters.named_or_file(str(file))
    with pytest.raises(Refused, match="cluster=h1000: no such option; allowed: a100_40g"):
        clusters.load("h1000")


def test_a_dtype_without_units_runs_in_a_wider_one() -> None:
    device = Device(peak_flops=Peak(fp32=1.0, bf16=4.0))
    assert device.flops("fp4") == device.flops("fp8") == device.flops("bf16") == 4.0
    assert Device(peak_flops=Peak(fp32=1.0), clock=0.5).flops("bf16") == 0.5


def test_changed_gives_another_cluster() -> None:
    h100 = clusters.load("h100")
    other = h100.changed({"between_nodes.bandwidth": 1.0, "node_size": 4})
    assert (other.between_nodes.bandwidth, other.node_size) == (1.0, 4)
    assert h100.node_size == 8 and other.in_node == h100.in_node


def test_a_fitted_number_takes_its_own_place_in_the_file() -> None:
    text = (clusters.FOLDER / "h100.yaml").read_text()
    after = replaced(text, "between_nodes.efficiency", 0.125)
    pairs = zip(text.splitlines(), after.splitlines(), strict=True)
    assert [new for old, new in pairs if old != new] == ["  efficiency: 0.125"]
    assert "matmul: 1.5e-05" in replaced(text, "device.efficiency.matmul", 1.5e-5)


def test_a_measured_profile_can_be_read_back(tmp_path: Path) -> None:
    laptop = clusters.load("laptop")
    file = tmp_path / "laptop.yaml"
    file.write_text(yaml_of(laptop))
    assert clusters.read(file) == laptop
    assert isinstance(laptop, Cluster)
