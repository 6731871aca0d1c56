"""Nodes on one Linux machine: network namespaces joined by a bridge, over links as slow as you say.

    python -m experiments.lab.shaped_links FILE   build what FILE says, run a command on each node

It runs in a network namespace that nobody else has (figures/loopback.py). Each node is a
namespace in it, which a process holds open that ends with this one. So when this process ends,
however it does, Linux takes nodes, links and bridge down: there is nothing to clean up, and nothing
of it can be seen from outside.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from experiments.figures.loopback import namespace
from experiments.process import (
    GRACE_S,
    child_environment,
    die_with_parent,
    module_command,
)

DEVICE = "eth0"  # of each node
BRIDGE = "lab"
TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
PLACES = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
BURST_S = 1e-3  # a link that was idle may send so long at once; more would hide its rate
SMALLEST_BURST = 10 * 1514  # bytes: ten frames
CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"  # of the namespace that one is in
QUEUE = 4 * 2**20  # bytes that wait in front of a link before it drops what comes
NOTICE_S = 20.0  # so long may the other nodes take to notice that one has failed
REFUSED = 2  # this module's exit status where the network cannot be built


class Missing(Exception):
    """This system or user cannot have such a network: one line that says why."""


@dataclass(frozen=True)
class Links:
    """One link a node, with a rate in each direction of its own."""

    nodes: int
    rate: float | None  # bits/s, headers included; None: as fast as the machine moves bytes
    delay: float = 0.0  # seconds that a frame is under way, each way

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"


def need_tools() -> None:
    """Raise Missing where a command that builds networks is not installed."""
    for tool, package in TOOLS.items():
        if shutil.which(tool, path=PLACES) is None:
            raise Missing(f"{tool} is not installed (package {package})")


def command(spec: Path | None = None) -> list[str]:
    """What runs this module in a namespace of its own. Raises Missing."""
    if sys.platform != "linux":
        raise Missing("network namespaces need Linux")
    need_tools()
    try:
        prefix = namespace()
    except OSError as error:
        raise Missing(
            f"{error}; run it as root (docker: --privileged), or allow user namespaces "
            "(sysctl user.max_user_namespaces=10000 kernel.unprivileged_userns_clone=1 "
            "kernel.apparmor_restrict_unprivileged_userns=0, those that there are)"
        ) from error
    return [*prefix, *module_command(__spec__.name), *([str(spec)] if spec else [])]


def write(spec: Path, links: Links, commands: list[list[str]]) -> None:
    """What `command(spec)` reads: the links, and what each node runs."""
    spec.write_text(_spec(links, commands))


def _spec(links: Links, commands: list[list[str]]) -> str:
    return json.dumps({"links": asdict(links), "commands": commands}, indent=1)


def probe(links: Links) -> None:
    """Build the network and take it down again. Raises Missing where that fails."""
    tried = subprocess.run(
        command(),
        input=_spec(links, []),
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    if tried.returncode == REFUSED:
        raise Missing(tried.stderr.strip())
    if tried.returncode:
        raise RuntimeError(tried.stderr)


class Network:
    """While open, the nodes are there, each with an address and a link to the others."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.holders: list[subprocess.Popen] = []

    def __enter__(self) -> Network:
        try:
            _do("ip", "link", "add", BRIDGE, "type", "bridge")
            _do("ip", "link", "set", BRIDGE, "up")
            for node in range(self.links.nodes):
                self.holders.append(_hold_namespace())
                self._connect(node)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for holder in self.holders:
            holder.kill()
            holder.wait()

    def on(self, node: int) -> list[str]:
        """What to put before a command so that it runs on a node."""
        return ["nsenter", f"--net=/proc/{self.holders[node].pid}/ns/net"]

    def _connect(self, node: int) -> None:
        port, links, on = f"port{node}", self.links, self.on(node)
        peer = ("type", "veth", "peer", "name", DEVICE, "netns", str(self.holders[node].pid))
        _do("ip", "link", "add", port, *peer)
        _do("ip", "link", "set", port, "master", BRIDGE, "up")
        _do("ip", "addr", "add", f"{links.address(node)}/24", "dev", DEVICE, on=on)
        _do("ip", "link", "set", DEVICE, "up", on=on)
        _do("ip", "link", "set", "lo", "up", on=on)
        # the same on every machine: reno is in every kernel; bbr, some systems' default, probes for
        # a rate that is known, and cubic may be forbidden here
        _do("sh", "-c", f"echo reno > {CONTROL}", on=on)
        if links.rate:
            burst = max(int(links.rate / 8 * BURST_S), SMALLEST_BURST)
            shape = ("rate", f"{links.rate:.0f}", "burst", str(burst), "limit", str(QUEUE + burst))
            _do("tc", "qdisc", "add", "dev", DEVICE, "root", "tbf", *shape, on=on)
        if links.delay:  # where frames leave the bridge for the node, behind the link's own queue
            late = ("netem", "delay", f"{links.delay * 1e6:.0f}us", "limit", "100000")
            _do("tc", "qdisc", "add", "dev", port, "root", *late)


HINTS = {  # what a command says -> what it means
    "netem": "delay needs a kernel with netem (modprobe sch_netem)",
    "tbf": "rate needs a kernel with tbf (modprobe sch_tbf)",
    "bridge": "it needs a kernel with bridges (modprobe bridge)",
    "veth": "it needs a kernel with veth (modprobe veth)",
}


def _do(*words: str, on: list[str] | None = None) -> None:
    """Run one command of the network's, behind `on`. Raises Missing with what it said."""
    environ = {**os.environ, "PATH": PLACES}
    done = subprocess.run([*(on or []), *words], capture_output=True, text=True, env=environ)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        hint = next((text for word, text in HINTS.items() if word in words), "it failed")
        raise Missing(f"{hint}: {' '.join(words)}: {said[0]}")


def _hold_namespace() -> subprocess.Popen:
    """A process in a new network namespace. It ends when this one does, for its input ends."""
    pipe = subprocess.PIPE
    holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=pipe, stdout=pipe)
    assert holder.stdin and holder.stdout
    holder.stdin.write(b"\n")
    holder.stdin.flush()
    if holder.stdout.readline() != b"\n":  # it answers from within
        raise Missing("no namespace in a namespace: unshare --net failed")
    return holder


class Together:
    """One process a node, that end together."""

    def __init__(self, processes: list[subprocess.Popen]) -> None:
        self.processes = processes

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Return the first status that is not 0. A node that failed takes the others with it.

        A node that a signal ended has failed (1), and a line on standard error names it.
        """
        first, deadline = 0, float("inf")
        while True:
            statuses = [process.poll() for process in self.processes]
            failed = next((i for i, status in enumerate(statuses) if status), None)
            if failed is not None and not first:
                first, deadline = statuses[failed] or 0, time.monotonic() + NOTICE_S
                if first < 0:
                    name = signal.Signals(-first).name
                    print(f"node {failed}: torchrun was ended by {name}", file=sys.stderr)
                    first = 1
            if None not in statuses:
                return first
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + GRACE_S
            time.sleep(0.02)


def run(links: Links, commands: list[list[str]]) -> int:
    """Run one command on each node until all have ended. Returns the first status that is not 0."""
    with Network(links) as network:
        environ, tied = child_environment(), partial(die_with_parent, os.getpid())
        processes = [
            subprocess.Popen([*network.on(node), *line], env=environ, preexec_fn=tied)
            for node, line in enumerate(commands)
        ]
        together = Together(processes)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # whoever started this one kills it if that takes too long
            signal.signal(number, lambda *_: together.send_signal(signal.SIGTERM))
        return together.wait()


def main(argv: list[str]) -> int:
    """In the namespace. A network that cannot be built is one line."""
    die_with_parent()
    spec = json.loads(Path(argv[0]).read_text() if argv else sys.stdin.read())
    try:
        return run(Links(**spec["links"]), spec["commands"])
    except Missing as error:
        print(error, file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
