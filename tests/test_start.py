"""How processes start: in any folder and locale, with closed streams and with ignored signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.console import LastingOutput
from experiments.process import module_command, not_ignored
from tests.launching import ROOT, environment

SHOW = """
import json, locale, os, sys
print(json.dumps({"encoding": locale.getpreferredencoding(False), "stdout": sys.stdout.encoding,
    "arguments": sys.argv[1:], "spec": __spec__.name, "path": sys.path}))
"""
OPEN = """
import os, sys
with open(sys.argv[1], "w") as file:
    print("not in the file")
    print([os.isatty(number) for number in (0, 1, 2)], sys.stdout is None, file=file)
"""
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # no UTF-8 of any origin


def a_house(folder: Path, program: str) -> list[str]:
    """Make a checkout that holds start.py and one module, `experiments.shown`; return its start."""
    package = folder / "house" / "experiments"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "shown.py").write_text(program)
    copy = package / "start.py"
    copy.write_bytes((ROOT / "experiments" / "start.py").read_bytes())
    return [sys.executable, str(copy), "experiments.shown"]


def test_a_module_is_of_its_own_checkout_whatever_the_current_folder_holds(tmp_path: Path) -> None:
    command = a_house(tmp_path, SHOW)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "experiments").mkdir(parents=True)
    for name in ("runpy.py", "random.py", "locale.py", "json.py", "experiments/shown.py"):
        (elsewhere / name).write_text("raise SystemExit('the current folder was searched')")
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    for more in ({}, {"PYTHONSAFEPATH": "1"}, ASCII):
        done = subprocess.run(
            [*command, "prompt=\u00e9"],
            cwd=elsewhere,
            env={**variables, **more},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert seen["encoding"].lower() == seen["stdout"].lower() == "utf-8"
        assert seen["arguments"] == ["prompt=\u00e9"] and seen["spec"] == "experiments.shown"
        assert str(elsewhere) not in seen["path"] and "" not in seen["path"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_not_the_next_file_that_is_opened(tmp_path: Path, closed: str) -> None:
    command, file = a_house(tmp_path, OPEN), tmp_path / "file"
    line = " ".join([*command, str(file), closed])
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert file.read_text() == "[False, False, False] False\n"
    told = ">&-" in closed.split() and "2>&-" not in closed
    assert done.stderr.count("standard output is closed") == told


def test_the_commands_of_a_run_start_in_a_folder_with_another_checkout() -> None:
    command = module_command("experiments.worker")
    assert command == [sys.executable, str(ROOT / "experiments" / "start.py"), "experiments.worker"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")
def test_output_that_fails_is_told_once_and_then_dropped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        out: Any = LastingOutput(full, tmp_path / "note")
        for _ in range(3):
            print("x" * 100_000, file=out, flush=True)
        assert out.encoding.lower() == "utf-8" and not out.isatty()
    assert capfd.readouterr().err.count("No space left on device") == 1
    assert (tmp_path / "note").read_text() == "No space left on device"


def test_a_reader_that_left_is_not_told(capfd: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as file:
        print("x", file=LastingOutput(file), flush=True)  # type: ignore[call-overload]
    assert capfd.readouterr().err == ""


def test_a_full_standard_output_of_a_command_is_one_line() -> None:
    done = subprocess.run(
        [str(ROOT / "launch.sh"), "score", "--help"],
        stdout=open("/dev/full", "w"),  # noqa: SIM115
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), "PYTHONUNBUFFERED": ""},
    )
    assert done.returncode == 1
    assert done.stderr == "launch.sh: standard output: No space left on device\n"


def test_signals_that_the_caller_ignores_stay_ignored() -> None:
    saved = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not_ignored(signal.SIGHUP, signal.SIGTERM) == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, saved)
