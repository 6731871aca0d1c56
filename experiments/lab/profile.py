"""The lab's network as a cluster profile: this machine's devices behind the lab's links."""

from __future__ import annotations

from dataclasses import replace

from experiments.lab.shaped_links import Links
from simulator.hardware import Cluster, Device, Level, Link, OperatorSpeed, numbers, tables

# Payload's share of what a link sends while as much comes the other way: two frames of 1514 bytes
# (as tbf counts them) hold 1448 of it each, and an acknowledgement of two frames takes 66 (RFC 894,
# RFC 5681 section 4.2, RFC 7323)
PAYLOAD = 2 * 1448 / (2 * 1514 + 66)
LABS_OWN = "derived: ./launch.sh lab, "


def profile_of(links: Links, ranks: int, cores: int, machine: Cluster) -> Cluster:
    """`ranks` devices of `machine`, which has `cores` of them, on the lab's nodes.

    Ranks that share a core have a part of it each, and what a machine loses where all of its cores
    compute, these ranks lose too, although each is a node. A message takes as long as its link or
    as the machine's own copying, whichever is longer; the core that computes does that copying, and
    only what the link takes longer leaves it free.
    """
    part = min(1.0, cores / ranks)
    inside = slower_level(machine.in_node, part)
    between = between_nodes(links, inside)
    whole = part / machine.crowded(min(ranks, machine.node_size))
    made = replace(
        machine,
        name=f"lab_{links.nodes}_nodes",
        device=slower_device(machine.device, whole),
        node_size=ranks // links.nodes,
        in_node=inside,
        between_nodes=between,
        operator_overhead=machine.operator_overhead / whole,
        overlap=max(0.0, 1 - between.rate / inside.rate),
        crowding=None,
        sources={},
    )
    return replace(made, sources=_sources(machine, made))


def longer_than_a_ring(nodes: int) -> dict[str, float]:
    """By how much gloo's messages take a link longer than a ring's, as a factor.

    Its reduce_scatter sends twice the bytes (costs/messages.py: gloo_bytes). Of its all_gather a
    rank sends one half and then asks for one (gloo/allgather.cc), and between two ranks both go
    over one connection: what the rank that calls last asks for waits behind what it sends, so that
    the other begins half of it late. Measured from that rank's call, it takes 1.44 to 1.48 times
    its bytes, the other 0.97 to 0.99 (chunks of 512 KiB and 1 MiB, 20 Mbit/s), and as the next call
    is again its own last, that is the pace. Four ranks ask over another connection: 1.03.
    """
    return {"reduce_scatter": 2.0, "all_gather": 1.5 if nodes == 2 else 1.0}


def between_nodes(links: Links, inside: Level) -> Level:
    """One of the lab's links, where the machine itself moves messages as it does `inside`."""
    longer = longer_than_a_ring(links.nodes)

    def link(name: str) -> Link:
        own = inside.of(name)
        wire = links.rate / 8 * PAYLOAD / longer.get(name, 1.0) if links.rate else own.rate
        return Link(min(wire, own.rate), own.latency + links.delay)

    names = sorted({*inside.collectives, *longer})
    plain = link("all_reduce")
    return Level(plain.bandwidth, plain.latency, collectives={name: link(name) for name in names})


def slower_level(level: Level, part: float) -> Level:
    """What is left of it for ranks that have a part of a core each."""
    table = {
        name: Link(link.bandwidth * part, link.latency / part)
        for name, link in level.collectives.items()
    }
    latency = level.latency / part
    return replace(level, bandwidth=level.bandwidth * part, latency=latency, collectives=table)


def slower_device(device: Device, part: float) -> Device:
    """The same device at a part of its speed."""
    operators = {
        name: OperatorSpeed(
            speed.latency / part,
            *(rate and rate * part for rate in (speed.bandwidth, speed.flops, speed.fill)),
        )
        for name, speed in device.operators.items()
    }
    bandwidth = device.memory_bandwidth * part
    return replace(
        device, clock=device.clock * part, memory_bandwidth=bandwidth, operators=operators
    )


def _sources(machine: Cluster, made: Cluster) -> dict[str, str]:
    """Where each number is from: the machine's own source, where it is the machine's number."""
    share = f"{LABS_OWN}of {machine.name}'s, by the cores that there are for the ranks"
    link = f"{LABS_OWN}its links' rate and delay, and {machine.name}'s own limits"
    mine = {"node_size": link, "overlap": link, "operator_overhead": share}
    mine |= {"device.clock": share, "device.memory_bandwidth": share, "device.operators": share}

    def source(key: str) -> str:
        if key.startswith("between_nodes."):
            return link
        return mine.get(key, share if key.startswith("in_node.") else machine.sources[key])

    return {key: source(key) for key in (*dict(numbers(made)), *tables(made))}
