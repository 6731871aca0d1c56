"""Mirrors of a run: what W&B's and TensorBoard's own files hold, and that none stops a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from costs import ledger as ledgers
from experiments.config import Logger, LoggingConfig, WandbMode
from experiments.tracking import has_login, make_tracker, wandb_mode
from tests.launching import SMALL, launch
from tests.made_runs import a_run

PICTURES = {"bytes", "loss", "memory", "time"}
RUN_TABLES = {
    "runs, the fastest a token first",
    "time of a step",
    "memory at the peak",
    "what a rank sends in a step, by collective and axis",
}
SWEEP_TABLES = {"what each difference changed", "precision: fp32 -> bf16"}


def mirrored(to: Logger, folder: Path, settings: dict, said: list[str]) -> None:
    """Mirror a folder as a run of two steps, or without settings as a sweep."""
    config = LoggingConfig(to=to, group="a sweep")
    tracker = make_tracker(config, folder, settings, said.append, rank=0)
    for step in range(2) if settings else ():
        tracker.log(step, {"step": step, "loss": 3.0 - step, "validation_loss": None})
    path = folder / "ledger.json"
    tracker.finish(ledgers.read(path) if path.exists() else None)
    if to == Logger.wandb:
        import wandb

        wandb.teardown()  # its own process writes the file, to the end when this one ends


def a_sweep(folder: Path) -> Path:
    for number, precision in enumerate(("fp32", "bf16")):
        a_run(folder / str(number), {"precision": precision}, step_s=0.1 - 0.05 * number)
    return folder


@pytest.mark.slow
def test_wandb_has_the_tables_and_pictures_of_a_run(tmp_path: Path) -> None:
    folder, said = a_run(tmp_path / "run"), []
    mirrored(Logger.wandb, folder, {"steps": 2, "api_key": "x"}, said)
    seen = wandb_records(wandb_file(folder))
    assert (
        seen["group"] == "a sweep"
        and seen["config"]["steps"] == 2
        and "api_key" not in seen["config"]
    )
    *steps, end = seen["history"]
    assert [row["loss"] for row in steps] == [3.0, 2.0]
    assert names(end, "tables/", "table-file") == RUN_TABLES
    assert names(end, "pictures/", "image-file") == PICTURES
    table = json.loads((media(folder) / end["tables/memory at the peak.path"]).read_text())
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert row["run"] == "run" and row["peak"] == 1500 and row["activations"] == 1000
    assert (media(folder) / end["pictures/memory.path"]).read_bytes()[:4] == b"\x89PNG"
    assert len(said) == 1 and "wandb sync" in said[0]


@pytest.mark.slow
def test_wandb_has_a_sweeps_comparison_beside_its_runs(tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep")
    mirrored(Logger.wandb, folder, {}, [])
    seen = wandb_records(wandb_file(folder))
    assert seen["group"] == "a sweep"
    assert names(seen["history"][-1], "tables/", "table-file") == RUN_TABLES | SWEEP_TABLES


def test_tensorboard_has_scalars_tables_and_pictures(tmp_path: Path) -> None:
    folder, said = a_run(tmp_path / "run"), []
    mirrored(Logger.tensorboard, folder, {"steps": 2, "api_key": "x"}, said)
    events = tensorboard_events(folder)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 3.0), (1, 2.0)]
    assert "validation_loss" not in events.Tags()["scalars"], "none was taken"
    (peak,) = events.Scalars("ledger/memory_bytes/peak")
    assert peak.value == 1500
    assert text_of(events, "config") == "    steps: 2\n"
    assert {n for n in text_names(events) if n.startswith("tables/")} == {
        f"tables/{name}" for name in RUN_TABLES
    }
    assert "| 1 | run | 1.50 kB |" in text_of(events, "tables/memory at the peak")
    assert set(events.Tags()["images"]) == {f"pictures/{name}" for name in PICTURES}
    (picture,) = events.Images("pictures/memory")
    assert picture.encoded_image_string[:4] == b"\x89PNG" and picture.width > 1000
    assert said == [f"TensorBoard: tensorboard --logdir {folder}"]


def test_tensorboard_has_a_sweeps_comparison_beside_its_runs(tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep")
    mirrored(Logger.tensorboard, folder, {}, [])
    events = tensorboard_events(folder)
    assert {f"tables/{name}" for name in RUN_TABLES | SWEEP_TABLES} == text_names(events)
    assert "0.5x" in text_of(events, "tables/precision: fp32 -> bf16")


def test_a_mirror_whose_package_is_not_there_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    mirrored(Logger.tensorboard, a_run(tmp_path / "run"), {"steps": 2}, said)
    assert len(said) == 1 and said[0].startswith("TensorBoard is off for this run: ")


@pytest.mark.parametrize(
    ("variable", "key", "mode"),
    [
        (None, WandbMode.offline, "offline"),
        (None, WandbMode.online, "online"),
        ("disabled", WandbMode.online, "disabled"),
        ("offline", WandbMode.online, "offline"),
        ("dryrun", WandbMode.online, "offline"),
        ("online", WandbMode.offline, "online"),
    ],
)
def test_wandbs_own_variable_is_obeyed(variable: str | None, key: WandbMode, mode: str) -> None:
    environ = {"WANDB_MODE": variable} if variable else {}
    assert wandb_mode(LoggingConfig(mode=key), environ) == mode
    with pytest.raises(ValueError, match="WANDB_MODE=on: must be online, offline or disabled"):
        wandb_mode(LoggingConfig(mode=key), {"WANDB_MODE": "on"})


def test_what_wandb_login_has_saved_is_a_login(tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    environ = {"NETRC": str(path)}
    assert not has_login(environ) and has_login({**environ, "WANDB_API_KEY": "k"})
    path.write_text(f"machine api.wandb.ai\n  login user\n  password {'a' * 40}\n")
    path.chmod(0o600)
    assert has_login(environ)
    assert not has_login({**environ, "WANDB_BASE_URL": "https://wandb.example.com"})
    path.write_text("machine api.wandb.ai login")
    assert not has_login(environ)


def test_a_disabled_mirror_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said: list[str] = []
    mirrored(Logger.wandb, a_run(tmp_path / "run"), {"steps": 2}, said)
    assert said == ["W&B is off for this run: WANDB_MODE=disabled"]
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.mark.slow
def test_wandb_is_offline_and_holds_config_steps_and_ledger(tmp_path: Path) -> None:
    done = launch(*SMALL, "logging=wandb", "run.dir=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wandb sync mine/wandb/offline-run-*" in done.stdout
    seen = wandb_records(wandb_file(tmp_path / "mine"))
    assert seen["config"]["steps"] == 4 and seen["config"]["model"]["d_model"] == 32
    *steps, end = seen["history"]
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert all(row["loss"] > 0 for row in steps)
    assert "ledger" in {key.partition(".")[0] for key in seen["summary"]}
    assert names(end, "tables/", "table-file") == RUN_TABLES


@pytest.mark.slow
def test_a_sweep_is_mirrored_run_by_run_and_side_by_side(tmp_path: Path) -> None:
    sweep = ("-m", *SMALL, "strategy=single", "precision=fp32,bf16", "logging=tensorboard")
    done = launch(*sweep, "run.dir=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for run in ("0", "1"):
        assert len(tensorboard_events(tmp_path / "mine" / run).Scalars("loss")) == 4
    assert "tables/precision: fp32 -> bf16" in text_names(tensorboard_events(tmp_path / "mine"))


@pytest.mark.slow
def test_a_mirror_that_fails_says_so_once_and_stops_nothing(tmp_path: Path) -> None:
    online = ("logging=wandb", "logging.mode=online")
    done = launch(*SMALL, *online, "run.dir=mine", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.count("W&B is off for this run: online needs WANDB_API_KEY") == 1
    assert ledgers.read(tmp_path / "mine" / "ledger.json")["training"]["steps"] == 4


def wandb_file(folder: Path) -> Path:
    (record,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    return record


def media(folder: Path) -> Path:
    return wandb_file(folder).parent / "files"


def names(row: dict[str, Any], prefix: str, kind: str) -> set[str]:
    """What of a row is of that kind, without the prefix that it shares."""
    found = {key.removesuffix("._type") for key, value in row.items() if value == kind}
    assert all(key.startswith(prefix) for key in found)
    return {key.removeprefix(prefix) for key in found}


def tensorboard_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    return events.Reload()


def text_names(events: Any) -> set[str]:
    return {name.removesuffix("/text_summary") for name in events.Tags()["tensors"]}


def text_of(events: Any, name: str) -> str:
    (event,) = events.Tensors(f"{name}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def wandb_records(path: Path) -> dict:
    """What an offline run's file holds: W&B's records in LevelDB's log format, after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    seen: dict = {"group": None, "config": {}, "history": [], "summary": {}}
    for content in leveldb_records(path.read_bytes(), start=7):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            seen["group"] = record.run.run_group
            items = record.run.config.update
            seen["config"] |= {item.key: json.loads(item.value_json) for item in items}
        elif kind == "history":
            seen["history"].append(values_of(record.history.item))
        elif kind == "summary":
            seen["summary"] |= values_of(record.summary.update)
    return seen


def values_of(items: Any) -> dict:
    return {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def leveldb_records(data: bytes, start: int) -> Iterator[bytes]:
    """Whole records; one that spans blocks of 32 KiB comes in parts (first, middle, last)."""
    block, head, position, parts = 2**15, 7, start, b""
    while position + head <= len(data):
        if block - position % block < head:
            position += block - position % block
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        parts += data[position + head : position + head + length]
        position += head + length
        if kind in (1, 4):  # full, or the last part
            yield parts
            parts = b""
