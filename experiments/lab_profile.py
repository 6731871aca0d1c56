"""The lab's network as a cluster profile: this machine's devices behind the lab's links."""

from __future__ import annotations

from dataclasses import replace

from experiments.shaped_links import Links
from simulator.hardware import Cluster, Level

# Payload's share of what a link sends while as much comes the other way: two frames of 1514 bytes
# (as tbf counts them) hold 1448 of it each, and an acknowledgement of two frames takes 66 (RFC 894,
# RFC 5681 section 4.2, RFC 7323)
PAYLOAD = 2 * 1448 / (2 * 1514 + 66)
LABS_OWN = "derived: ./launch.sh lab, "


def profile_of(links: Links, ranks: int, cores: int, machine: Cluster) -> Cluster:
    """`ranks` devices of `machine`, which has `cores` of them, on the lab's nodes.

    Ranks that share a core have a part of it each. A message takes as long as its link or as the
    machine's own copying, whichever is longer; the core that computes does that copying, and only
    what the link takes longer leaves it free.
    """
    part = min(1.0, cores / ranks)
    device, own = machine.device, machine.in_node
    inside = replace(own, bandwidth=own.bandwidth * part, latency=own.latency / part)
    wire = links.rate / 8 * PAYLOAD if links.rate else inside.rate
    between = Level(
        bandwidth=min(wire, inside.rate), latency=inside.latency + links.delay, efficiency=1.0
    )
    bandwidth = device.memory_bandwidth * part
    shared = replace(device, clock=device.clock * part, memory_bandwidth=bandwidth)
    made = replace(
        machine,
        name=f"lab_{links.nodes}_nodes",
        device=shared,
        node_size=ranks // links.nodes,
        in_node=inside,
        between_nodes=between,
        operator_overhead=machine.operator_overhead / part,
        overlap=max(0.0, 1 - between.rate / inside.rate),
    )
    return replace(made, sources=_sources(machine, made))


def _sources(machine: Cluster, made: Cluster) -> dict[str, str]:
    """Where each number is from: the machine's own source, where it is the machine's number."""
    share = f"{LABS_OWN}of {machine.name}'s, by the cores that there are for the ranks"
    link = f"{LABS_OWN}its links' rate and delay, and {machine.name}'s own limits"
    lab = {"node_size": link, "overlap": link, "operator_overhead": share}
    lab |= {"device.clock": share, "device.memory_bandwidth": share}
    for key in ("bandwidth", "latency", "efficiency", "oversubscription"):
        lab |= {f"in_node.{key}": share, f"between_nodes.{key}": link}
    return {**machine.sources, **lab}
