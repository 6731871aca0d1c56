"""What is let in from outside: the playground's requests, text in tables, files of other runs."""

from __future__ import annotations

import gzip
import http.client
import random
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from experiments.playground.answers import answer
from experiments.playground.plan import read_all
from experiments.playground.speed import started
from tests.made_runs import a_run
from tests.soak.trial import trial
from tests.test_outside import flipped
from tests.test_playground import SOCKET, UPGRADE, WHOLE_WORLD, status_of

GROUP = "Let in"


def command(*argv: str) -> tuple[int, str, str]:
    """Run a command of ours; return its exit status, standard output and standard error."""
    line = [sys.executable, "-m", "experiments", *argv]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr.strip()


@trial(GROUP, "playground: another site's Host or Origin asks for the page and both sockets")
def foreign_requests(_folder: Path) -> str:
    with started() as (address, _):
        own = {"Origin": address.rstrip("/")}
        ways = {"page": ("/", {}), "polling": (SOCKET + "polling", {})}
        ways["websocket"] = (SOCKET + "websocket", UPGRADE)
        seen = []
        for name, (path, headers) in ways.items():
            good = status_of(address, path, {**headers, **own})
            hosts = status_of(address, path, {**headers, "Host": "rebound.example"})
            origins = status_of(address, path, {**headers, "Origin": "http://evil.example"})
            assert good in (101, 200) and hosts == origins == 403
            seen.append(f"{name}: own {good}, foreign Host {hosts}, foreign Origin {origins}")
    return "; ".join(seen)


@trial(GROUP, "playground: the position that listed four million ranks, on 134,217,728 devices")
def whole_world(_folder: Path) -> str:
    read_all()
    began = time.perf_counter()
    made = answer(WHOLE_WORLD)
    seconds = time.perf_counter() - began
    assert "<svg" in made["timeline"] and "could not" not in made["verdict"] and seconds < 60
    with started() as (address, _):
        began = time.perf_counter()
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        page = time.perf_counter() - began
    return f"answered with its timeline in {seconds:.2f} s, the page itself in {page:.2f} s"


@trial(GROUP, "compare: runs whose keys and names are markup, formulas and escape sequences")
def hostile_text(folder: Path) -> str:
    text = "=cmd()[/red]|<b>\x1b[31m\u202e"
    a_run(folder / "[/a]", {"optimizer.name": "adamw"})
    a_run(folder / "b", {"optimizer.name": text})
    for form in ((), ("--format", "csv"), ("--format", "markdown")):
        status, shown, said = command("compare", str(folder), *form)
        assert status == 0 and not said
        assert "\x1b" not in shown and "\u202e" not in shown
        assert not form or "x1b[31m" in shown.replace("\\[", "[")  # as words
        assert form[1:] != ("csv",) or "'=cmd()" in shown
        assert form[1:] != ("markdown",) or "<b>" not in shown
    return "exit 0 in all three formats; escapes are shown as \\x1b, the formula as '=cmd()"


@trial(GROUP, "report and replay: 200 flipped bits of a trace, then 4 GB in a gzip of 4 MB")
def damaged_traces(folder: Path) -> str:
    from costs import trace as traces
    from costs.trace import Trace
    from tests.test_outside import PROGRAM
    from tests.test_pictures import a_step

    run = a_run(folder / "run")
    path = run / "trace.json.gz"
    traces.write(path, Trace(a_step(2), {0: [*PROGRAM], 1: [*PROGRAM]}, [], {}))
    whole, right, bits, refused = path.read_bytes(), traces.read(path), random.Random(7), 0
    for _ in range(200):
        path.write_bytes(flipped(whole, bits))
        try:
            assert traces.read(path) == right
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    path.write_bytes(gzip.compress(b" " * 2**22) * 1000)
    status, _, said = command("replay", str(run), "cluster=ethernet_10g")
    assert status == 2 and said.count("\n") == 0 and "unpacks to more than 256 MiB" in said
    line = said.rpartition(": ")[2]
    return f"{refused} refused in a line, {200 - refused} read rightly; then exit 2: {line}"
