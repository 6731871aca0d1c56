"""Bytes that leave the nodes in a step, from the rows of a ledger: rings that cross their edges."""

from __future__ import annotations

import numpy as np

from experiments.ask.evidence import Run
from experiments.ask.quantity import Quantity
from parallel.layout import MESH_AXES


def leaving(run: Run, node_size: int) -> Quantity:
    """Bytes that all ranks together send to another node, with collectives as rings of neighbours
    in rank, and `node_size` ranks a node.

    The ledger needs one rank of each pp place (a formula's), or all ranks. Axes that ep is carved
    out of are not told apart, so a layout with ep is refused.
    """
    layout = run.ledger["layout"]
    assert layout["ep"] == 1, "ep is carved out of another axis"
    mesh = np.arange(layout["world_size"]).reshape([layout[axis] for axis in MESH_AXES])
    ranks = run.ledger["ranks"]
    places = mesh.reshape(layout["pp"], -1)
    whole = 0.0
    for place, members in enumerate(places):
        for rank in members.tolist():
            step = ranks[rank] if len(ranks) == layout["world_size"] else ranks[place]
            for row in step["communication"]:
                if next_on(mesh, row, rank) // node_size != rank // node_size:
                    whole += row["wire_bytes"]
    how = f"ranks[].communication[].wire_bytes of rings that cross nodes of {node_size}"
    return Quantity(f"{run.name}: bytes between nodes", whole, "B", run.source, run.run, how)


def next_on(mesh: np.ndarray, row: dict, rank: int) -> int:
    """The rank that `rank` sends a row's bytes to: its neighbour on the row's axis."""
    names = row["axis"].split("*")
    axes = [MESH_AXES.index(name) for name in names]
    at = [int(i) for i in np.argwhere(mesh == rank)[0]]
    # joined axes are one ring, the last axis innermost
    sizes = [mesh.shape[axis] for axis in axes]
    flat = int(np.ravel_multi_index([at[axis] for axis in axes], sizes))
    step = -1 if names == ["pp"] and row.get("phase") == "backward" else 1
    following = np.unravel_index((flat + step) % int(np.prod(sizes)), sizes)
    for axis, place in zip(axes, following, strict=True):
        at[axis] = int(place)
    return int(mesh[tuple(at)])
