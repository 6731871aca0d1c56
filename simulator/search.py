"""The best of all plans: every one predicted, ranked by time, and why the others lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from costs.ledger import MEMORY_PARTS
from parallel.layout import MESH_AXES
from simulator.estimate import step_seconds
from simulator.flops import model_flops_per_token
from simulator.hardware import DTYPES, Cluster
from simulator.memory import memory
from simulator.plans import NONE, Array, Plans
from simulator.space import Space, plans_of
from simulator.work import OWN_DTYPE, Work

OUT_OF_MEMORY = "out of memory"
# what a plan loses by, where it takes longer than the winner
LOSSES = ("exposed_communication", "bubble", "optimizer")
PARTS = ("compute", *LOSSES)
RECOMPUTES, SMALL_TILES = "recomputation", "tiles too small"
BEST = 100  # plans of which memory is known exactly, as many as are shown at least
# of a step: what an axis more should gain at least. Chosen: in the mean, rows of one source are off
# by 2 to 16 % (docs/results/score.md)
CLOSE = 0.05
CHUNK = 20_000  # plans at a time: arrays that stay in the caches


@dataclass(frozen=True)
class Predicted:
    """Plans and what each takes: seconds of a step by part, bytes of the fullest rank by part."""

    plans: Plans
    time_s: dict[str, Array]  # as simulator.estimate.step_seconds gives them; of a search NaN
    # where a plan does not fit and nobody has asked
    memory_bytes: dict[str, Array]  # peak, and costs.ledger.MEMORY_PARTS
    model_flops: Array  # of one rank
    peak_flops: Array  # of its device, in the dtype of the products

    @property
    def mfu(self) -> Array:
        return self.model_flops / self.peak_flops / self.time_s["total"]

    def __len__(self) -> int:
        return len(self.plans)


def predict(plans: Plans, cluster: Cluster, limit: float = np.inf) -> Predicted:
    """Time and memory of each plan on a cluster; time only of those that need at most `limit`."""
    needed = joined([fullest(chunk) for chunk in _chunks(plans)])
    fitting = np.flatnonzero(needed["peak"] <= limit)
    time = {part: np.full(len(plans), np.nan) for part in ("total", *PARTS)}
    fill(time, fitting, seconds_of(plans[fitting], cluster))
    # in this order: the flops of all ranks together are more than 2^63
    flops = plans.tokens / plans.world_size * model_flops_per_token(plans.model, plans.seq_len)
    return Predicted(plans, time, needed, flops, peak_flops(plans.precision, cluster))


def seconds_of(plans: Plans, cluster: Cluster) -> dict[str, Array]:
    """Return the seconds of a step by part."""
    return joined([step_seconds(Work.of(chunk), cluster) for chunk in _chunks(plans)])


def _chunks(plans: Plans) -> list[Plans]:
    return [plans[slice(i, i + CHUNK)] for i in range(0, len(plans), CHUNK)]


def joined(chunks: list[dict[str, Array]]) -> dict[str, Array]:
    """Return the columns of one array of plans from those of its chunks."""
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in (chunks or [{}])[0]}


def fill(columns: dict[str, Array], places: Array, values: dict[str, Array]) -> None:
    """Put `values` at `places` of the columns of the same name."""
    for name, own in values.items():
        columns[name][places] = own


def peak_flops(precision: Array, cluster: Cluster) -> Array:
    """FLOP/s of a device's datasheet in the dtype that the products run in, by place in
    PRECISIONS."""
    rates = np.array([cluster.device.flops(name) for name in DTYPES])
    return rates[OWN_DTYPE[precision]]


Bytes = dict[str, Array]  # peak, and costs.ledger.MEMORY_PARTS


def fullest(plans: Plans) -> Bytes:
    """Memory of the first or of the last pp rank, whichever is fuller: the first has most
    micro-batches under way, the last the logits."""
    found = {name: values.copy() for name, values in of_rank(plans, 0).items()}
    pipelines = np.flatnonzero(plans.pp > 1)
    take_fuller(found, plans, pipelines, plans.pp[pipelines] - 1)
    return found


def fullest_of_all(plans: Plans) -> Bytes:
    """Of all of them: a rank between others has messages from both sides, and with several stages a
    rank any may be the fullest."""
    found = fullest(plans)
    for place in range(1, int(plans.pp.max(initial=0)) - 1):
        take_fuller(found, plans, np.flatnonzero(plans.pp - 1 > place), place)
    return found


def take_fuller(found: Bytes, plans: Plans, which: Array, place: Array | int) -> None:
    """Put what pp rank `place` of some plans holds where it is more."""
    if not len(which):
        return
    own = of_rank(plans[which], place)
    more = own["peak"] > found["peak"][which]
    for name, values in own.items():
        found[name][which[more]] = values[more]


def of_rank(plans: Plans, place: Array | int) -> Bytes:
    """Memory of pp rank `place` of each plan."""
    own = memory(plans, place)
    return {
        part: np.broadcast_to(getattr(own, part), len(plans)) for part in ("peak", *MEMORY_PARTS)
    }


@dataclass(frozen=True)
class Found:
    """All plans of a space, and which of them are how good."""

    predicted: Predicted
    limit: float  # bytes that a plan may need
    refused: Counter[str]  # plans that the rules refuse, by key
    exact: Array  # whether all pp ranks of a plan were looked at, not the first and the last alone
    cluster: Cluster

    def look_at(self, places: Iterable[int]) -> None:
        """Know the memory of these plans exactly, for what is shown must fit on every rank; and
        their time, which of plans that do not fit is not known yet."""
        new = np.array([i for i in places if not self.exact[i]], dtype=np.int64)
        if not len(new):
            return
        plans, time = self.predicted.plans, self.predicted.time_s
        fill(self.predicted.memory_bytes, new, fullest_of_all(plans[new]))
        unknown = new[np.isnan(time["total"][new])]
        fill(time, unknown, seconds_of(plans[unknown], self.cluster))
        self.exact[new] = True

    def best_of(self, places: Array) -> int:
        """The fastest of these plans that fits, or else the one that needs least."""
        while True:
            fitting = places[self.fits[places]]
            time, peak = self.predicted.time_s["total"], self.predicted.memory_bytes["peak"]
            key, among = (time, fitting) if len(fitting) else (peak, places)
            best = int(among[np.argmin(key[among])])
            if self.exact[best]:
                return best
            self.look_at([best])

    @property
    def fits(self) -> Array:
        return self.predicted.memory_bytes["peak"] <= self.limit

    @property
    def order(self) -> Array:
        """Places of the plans that fit, the fastest first; of those that are as fast but for a
        thousandth the one with fewest axes, and of these with least memory."""
        fitting = np.flatnonzero(self.fits)
        plans = self.predicted.plans[fitting]
        time = np.round(1e3 * np.log(self.predicted.time_s["total"][fitting]))
        peak = self.predicted.memory_bytes["peak"][fitting]
        return fitting[np.lexsort((peak, count_axes(plans), time))]

    def simplest(self) -> int | None:
        """The plan with fewest axes of those that take at most CLOSE longer than the fastest; of
        several the fastest. None where nothing fits."""
        while len(order := self.order):
            time = self.predicted.time_s["total"][order]
            near = order[time <= (1 + CLOSE) * time.min()]
            chosen = int(near[np.argmin(count_axes(self.predicted.plans[near]))])
            if self.exact[chosen]:
                return chosen
            self.look_at([chosen])
        return None

    def front(self) -> Array:
        """Places of the plans that no other beats in both time and memory, the fastest first."""
        fitting = np.flatnonzero(self.fits)
        time, peak = self.predicted.time_s["total"], self.predicted.memory_bytes["peak"]
        order = fitting[np.lexsort((peak[fitting], time[fitting]))]
        peak = peak[order]
        lowest = np.minimum.accumulate(peak)
        better = np.concatenate([[True], peak[1:] < lowest[:-1]]) if len(order) else order == 0
        return order[better]

    def reasons(self) -> Counter[str]:
        """Why plans are not the best: how many by each reason, refused ones by their key."""
        lost = Counter({f"refused: {key}": count for key, count in self.refused.items()})
        lost[OUT_OF_MEMORY] = int((~self.fits).sum())
        order = self.order
        if len(order) > 1:
            lost.update(Counter(self.lost(order[1:], int(order[0])).tolist()))
        return Counter({reason: count for reason, count in lost.items() if count})

    def margins(self) -> dict[str, float]:
        """By how much the plans of each reason lose, in the median: bytes over the limit where
        they are out of memory, else seconds that the part takes more than the winner's."""
        order, over = self.order, self.predicted.memory_bytes["peak"][~self.fits] - self.limit
        found = {OUT_OF_MEMORY: float(np.median(over))} if len(over) else {}
        if len(order) > 1:
            why = self.lost(order[1:], int(order[0]))
            worst = np.max(self._excess(order[1:], int(order[0])), axis=0)
            found |= {name: float(np.median(worst[why == name])) for name in np.unique(why)}
        return found

    def _excess(self, which: Array, winner: int) -> Array:
        """(parts, plans): seconds of compute and of LOSSES more than the winner's."""
        time = self.predicted.time_s
        return np.stack([time[part][which] - time[part][winner] for part in PARTS])

    def lost(self, which: Array, winner: int) -> Array:
        """What each of `which` loses most time by against the winner."""
        plans, excess = self.predicted.plans, self._excess(which, winner)
        again = (plans.checkpointing[which] != NONE) & (
            plans.checkpointing[which] != plans.checkpointing[winner]
        )
        computing = np.where(again, RECOMPUTES, SMALL_TILES)
        names = np.array([part.replace("_", " ") for part in PARTS], dtype=object)
        worst = np.argmax(excess, axis=0)
        return np.where(worst == 0, computing, names[worst])


def count_axes(plans: Plans) -> Array:
    """How many axes each plan has."""
    counted = [(getattr(plans, axis) > 1).astype(np.int64) for axis in (*MESH_AXES, "ep")]
    return np.sum(counted, axis=0)


def search(
    space: Space,
    cluster: Cluster,
    headroom: float,
    tp_in_node: bool = True,
    best: int = BEST,
) -> Found:
    """Predict every plan. `headroom`: the share of the memory that must stay free. Of the `best`,
    and of those that no other beats, all pp ranks are looked at.

    Raises ValueError where no plan has the devices, divides the batch or is let pass by the rules.
    """
    plans, refused = plans_of(space)
    if tp_in_node:
        inside = plans.tp <= cluster.node_size
        refused["layout.tp: not within a node"] = int((~inside).sum())
        plans = plans[inside]
    if not len(plans):
        reasons = ", ".join(f"{count} by {key}" for key, count in refused.most_common() if count)
        raise ValueError(f"no plan is left; refused: {reasons}")
    limit = cluster.device.memory_bytes * (1 - headroom)
    predicted = predict(plans, cluster, limit)
    found = Found(predicted, limit, +refused, np.zeros(len(plans), dtype=bool), cluster)
    while not found.exact[shown := np.concatenate([found.order[:best], found.front()])].all():
        # of more each time: where many do not fit after all, the end comes soon
        further = found.order[: best + np.count_nonzero(found.exact)]
        found.look_at({*shown.tolist(), *further.tolist()})
    return found
