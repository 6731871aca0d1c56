"""It starts, or says why not: first launches, Pythons, locales, streams, terminals, many ranks.

WORLDSIZE_PAIRS is the number of pairs of first launches, 20 if it is not set. Each pair installs
one .venv of a gigabyte, through pip as it is configured here (its cache, PIP_FIND_LINKS).
"""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from costs import ledger as ledgers
from experiments.run_folder import read_config
from tests.launching import ROOT, SMALL, environment, launch, wait_until
from tests.soak.trial import trial
from tests.test_pins import PYTHONS, pins

GROUP = "It starts, or says why not"
TINY = (*SMALL, "model.n_head=1", "model.n_layer=1", "micro_batch_size=1", "steps=3")
BARE_PYTHON = f"{sys.base_prefix}/bin/python3"  # the one that this environment was made from


def run_at(command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess:
    """Run a shell line as a user would."""
    variables = {**environment(), **more}
    line = ["bash", "-c", command]
    return subprocess.run(line, cwd=cwd, env=variables, capture_output=True, text=True)


def clone(folder: Path) -> Path:
    """Make a fresh clone of this checkout, as committed."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


def bare() -> dict[str, str]:
    """Return the environment of a user whose Python has no packages."""
    kept = {k: v for k, v in environment().items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "PYTHON": BARE_PYTHON}


def trained(folder: Path) -> int:
    """Return the steps that the run in `folder` has trained; raises if it is not whole."""
    assert (folder / "model.pt").exists()
    return int(ledgers.read(folder / "ledger.json")["training"]["steps"])


@trial(GROUP, "`layout.dp_shard=12 strategy=fsdp`, and 32 ranks on one machine")
def many_ranks(folder: Path) -> str:
    said = []
    for ranks in (12, 32):
        done = launch(
            *TINY, "strategy=fsdp", f"layout.dp_shard={ranks}", f"run.dir={ranks}", cwd=folder
        )
        assert done.returncode == 0, done.stderr
        assert read_config(folder / str(ranks)).layout.world_size == ranks
        said.append(f"{ranks} ranks: exit 0, {trained(folder / str(ranks))} steps")
    return "; ".join(said)


@trial(GROUP, "constraints.txt resolved by uv for Python 3.10 to 3.13, from the package index")
def pins_resolve(folder: Path) -> str:
    subprocess.run([BARE_PYTHON, "-m", "venv", str(folder / "uv")], check=True)
    subprocess.run([str(folder / "uv/bin/pip"), "install", "-q", "uv"], check=True)
    said = []
    for python in PYTHONS:
        line = f"uv/bin/uv pip compile --no-header --no-annotate --python-version {python} "
        line += f"--extra dev --extra float8 -c {ROOT}/constraints.txt {ROOT}/pyproject.toml"
        done = run_at(line, folder)
        assert done.returncode == 0, done.stderr
        found = dict(row.split(" ;")[0].split("==") for row in done.stdout.splitlines())
        loose = {name for name in found.keys() - pins(python).keys() if not _of_cuda(name)}
        assert not loose, f"Python {python}: no pin for {sorted(loose)}"
        said.append(f"{python}: {len(found)} packages")
    return f"all resolve, each package pinned except torch's CUDA libraries: {', '.join(said)}"


def _of_cuda(name: str) -> bool:
    return name.startswith(("nvidia", "cuda", "triton"))


@trial(GROUP, "pairs of first launches at once, on fresh clones")
def first_launches(folder: Path) -> str:
    pairs = int(os.environ.get("WORLDSIZE_PAIRS", "20"))
    waited = 0
    for number in range(pairs):
        here = clone(folder / str(number))
        two = [
            subprocess.Popen(
                ["./launch.sh", *TINY, f"run.dir={name}"],
                cwd=here,
                env=bare(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in ("a", "b")
        ]
        said = [process.communicate() for process in two]
        assert [process.returncode for process in two] == [0, 0], said
        assert trained(here / "a") == trained(here / "b") == 3
        waited += sum("another launch is setting up .venv" in err for _, err in said)
        shutil.rmtree(here)
    return f"{pairs} of {pairs} pairs train; {waited} launches waited for the other's .venv"


@trial(GROUP, "a `.venv` whose Python is gone, then one whose torch was removed")
def broken_venv(folder: Path) -> str:
    here = clone(folder / "clone")
    line = f"./launch.sh {' '.join(TINY)}"
    first = run_at(f"{line} run.dir=a", here, **bare())
    assert first.returncode == 0, first.stderr
    python = here / ".venv" / "bin" / "python3"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    gone = run_at(f"{line} run.dir=b", here, **bare())
    assert gone.returncode == 0 and trained(here / "b") == 3, gone.stderr
    (torch,) = (here / ".venv" / "lib").glob("python*/site-packages/torch")
    shutil.rmtree(torch)
    removed = run_at(f"{line} run.dir=c", here, **bare())
    assert removed.returncode == 0 and trained(here / "c") == 3, removed.stderr
    assert all("setting up .venv" in done.stderr for done in (first, gone, removed))
    quiet = run_at(f"{line} run.dir=d", here, **bare())
    assert quiet.returncode == 0 and quiet.stderr == ""
    return "made anew in both cases, and each run trains; the launch after that installs nothing"


@trial(GROUP, "launch.sh through a link, beside a random.py, a csv.py and another `experiments/`")
def link_and_names(folder: Path) -> str:
    (folder / "experiments").mkdir()
    for name in ("random.py", "csv.py", "numpy.py", "experiments/worker.py"):
        (folder / name).write_text("raise SystemExit('the current folder was searched')")
    (folder / "link").symlink_to(ROOT / "launch.sh")
    done = run_at(f"./link {' '.join(TINY)} run.dir=a", folder)
    assert (done.returncode, done.stderr) == (0, "")
    return f"exit 0, {trained(folder / 'a')} steps, nothing of the current folder is run"


@trial(
    GROUP, "LC_ALL=en_US in ISO-8859-1, and C without UTF-8: BPE, a prompt with an umlaut, report"
)
def locales(folder: Path) -> str:
    made = folder / "en_US.ISO-8859-1"
    latin = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(made)]
    subprocess.run(latin, check=True, capture_output=True)
    text = "Gr\u00fc\u00dfe aus K\u00f6ln, \u4f60\u597d. " * 2000
    (folder / "book.txt").write_text(text, encoding="utf-8")
    data = "data=text data.path=book.txt data.tokenizer=bpe data.vocab_size=300"
    data += " model.vocab_size=300 data.cache=cache"
    small = " ".join(one for one in TINY if not one.startswith("data="))
    for name, variables in {
        "latin": {"LC_ALL": "en_US.ISO-8859-1", "LOCPATH": str(folder)},
        "c": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        "posix": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
    }.items():
        door = f"{sys.executable} -m experiments"  # without launch.sh's own PYTHONUTF8
        more = {**variables, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
        for line in (
            f"{door} {small} {data} run.dir={name}",
            f"{door} generate run={name} tokens=5 prompt=K\u00f6ln",
            f"{door} report {name} out={name}.html",
        ):
            done = run_at(line, folder, **more)
            assert done.returncode == 0, f"{name}: {line}: {done.stderr}"
            if "prompt=" in line:
                assert done.stdout.startswith("K\u00f6ln")
        assert (folder / f"{name}.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    return "each of the three commands exits 0 in each of three locales; report and text are UTF-8"


@trial(GROUP, "`>&-` and `>/dev/full`")
def outputs(folder: Path) -> str:
    said = []
    for name, sink in (("closed", ">&-"), ("full", ">/dev/full")):
        done = run_at(f"{ROOT}/launch.sh {' '.join(TINY)} run.dir={name} {sink}", folder)
        assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
        said.append(f"{sink}: exit 0, {trained(folder / name)} steps, `{done.stderr.strip()}`")
    return "; ".join(said)


@trial(
    GROUP, "`nohup ./launch.sh ... &`, then the terminal closes; Ctrl-C to a run in the background"
)
def terminal_closes(folder: Path) -> str:
    long = " ".join((*TINY, "steps=300"))
    shell, terminal = pty.fork()
    if shell == 0:
        os.chdir(folder)
        line = f"nohup {ROOT}/launch.sh {long} run.dir=a >out 2>&1 & echo $! >pid; wait"
        os.execve("/bin/bash", ["bash", "-c", line], environment())
    log = folder / "a" / "metrics.jsonl"
    wait_until("a step", lambda: log.exists() and log.stat().st_size > 0)
    run = psutil.Process(int((folder / "pid").read_text()))
    os.close(terminal)
    with contextlib.suppress(ProcessLookupError):  # as an emulator does
        os.killpg(shell, signal.SIGHUP)
    os.waitpid(shell, 0)
    run.send_signal(signal.SIGINT)  # a background job of a script ignores it
    wait_until("the end of the run", lambda: not run.is_running() or run.status() == "zombie")
    time.sleep(0.1)
    steps = trained(folder / "a")
    assert steps == 300
    return f"the run goes on without its terminal: {steps} of 300 steps, its model is saved"
