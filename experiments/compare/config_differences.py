"""What differs between the configurations of runs, and which runs tell what it changed.

Two runs differ in a set of keys. A set is elementary where no part of it tells two other runs
apart: of a sweep over strategy and precision these are `precision`, and the two axes of a layout
that always change together. Each run is compared with the first one that differs from it by an
elementary set; keys that never change alone cannot be told apart, and are shown as one difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.compare.find_runs import Run
from experiments.resume import dotted

# where a run leaves its files, and how it was asked for; none of them is in a step
NOT_COMPARED = (
    "run",
    "logging",
    "launch",
    "timeout_s",
    "sample",
    "trace",
    "method",
    "rank",
    "scale",
)
# all that shapes a step. A simulation knows the other keys too, but they mean nothing there
OF_A_STEP = (
    "model",
    "layout",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "seq_len",
    "precision",
    "activation_checkpointing",
    "compile",
    "impl",
    "zero_stage",
    "gradient_sync",
    "sequence_parallel",
    "pipeline",
    "clip",
    "cluster",
)
OF_THE_BATCHES = ("data.", "seed", "seq_len")  # which tokens are in a batch, whatever its size
SOURCE, CLUSTER = "source", "cluster"
SIMULATED = ("formula", "traced")
AUTO = "auto"  # nobody asked which it was
UNKNOWN = -1  # differs from nothing
WORD = 62  # keys whose bits fit a whole number of numpy's
Values = dict[str, Any]


@dataclass
class Difference:
    """Keys that change together, from what to what, and the pairs of runs that show it."""

    before: Values
    after: Values
    pairs: list[tuple[int, int]] = field(default_factory=list)  # positions in the list of runs

    @property
    def keys(self) -> list[str]:
        return list(self.before)


@dataclass(frozen=True)
class Differences:
    """Of a list of runs: the keys that differ, each run's values of them, and what changes what."""

    keys: list[str]
    values: list[Values]  # of each run, what it has of `keys`
    elementary: list[Difference]
    repeats: list[list[int]]  # runs of one configuration and source, where there are several
    predictions: list[tuple[int, int]]  # a measured run, a simulated one of its configuration


def settings_of(run: Run) -> Values:
    """What a run's configuration says, by dotted key, and where its ledger is from."""
    flat = dotted({k: v for k, v in run.ledger["config"].items() if k not in NOT_COMPARED})
    if run.source in SIMULATED:
        flat = {key: v for key, v in flat.items() if key.partition(".")[0] in OF_A_STEP}
    replayed = run.ledger["environment"].get("replay") or {}
    cluster = flat.get("cluster.name") or replayed.get("cluster")
    flat = {key: v for key, v in flat.items() if not key.startswith("cluster.") and v != AUTO}
    return {SOURCE: run.source, CLUSTER: cluster or "-", **flat}


def differences_of(runs: list[Run]) -> Differences:
    """Compare all runs. A key that a ledger lacks differs from nothing."""
    settings = [settings_of(run) for run in runs]
    keys, codes = _coded(settings)
    pairs = pairs_of(codes)
    apart = sum(1 << k for k, key in enumerate(keys) if key in (SOURCE, CLUSTER))
    predictions = _predictions(runs, pairs, apart)
    known = {frozenset(pair) for pair in predictions}
    found: dict[str, Difference] = {}
    for i, j, mask in _edges(pairs):
        if frozenset((i, j)) in known:
            continue  # nothing differs but how it is known
        names = [key for k, key in enumerate(keys) if mask >> k & 1]
        before, after = ({key: settings[x][key] for key in names} for x in (i, j))
        if repr((after, before)) in found:
            found[repr((after, before))].pairs.append((j, i))
        else:
            found.setdefault(repr((before, after)), Difference(before, after)).pairs.append((i, j))
    return Differences(
        keys,
        [{key: own[key] for key in keys if key in own} for own in settings],
        list(found.values()),
        _repeats(pairs),
        predictions,
    )


def _coded(settings: list[Values]) -> tuple[list[str], np.ndarray]:
    """The keys that differ, and for each run and key a number that stands for the value."""
    keys = list(dict.fromkeys(key for own in settings for key in own))
    columns, kept = [], []
    for key in keys:
        seen: dict[str, int] = {}
        column = [
            seen.setdefault(repr(o[key]), len(seen)) if key in o else UNKNOWN for o in settings
        ]
        if len(seen) > 1:
            kept.append(key)
            columns.append(column)
    return kept, np.array(columns, dtype=np.int32).reshape(len(kept), len(settings)).T


@dataclass(frozen=True)
class Pairs:
    """Of each two runs the keys that differ. Most pairs of a grid differ in one of a few sets."""

    masks: list[int]  # the sets, keys as bits of a whole number
    which: np.ndarray  # (N, N): [j, i] is the place in `masks` of runs i < j, -1 elsewhere

    def that(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int, int]]:
        """(i, j, keys) of the pairs whose set is wanted, by j, then by i."""
        places = [place for place, mask in enumerate(self.masks) if wanted(mask)]
        for j, i in np.argwhere(np.isin(self.which, places)).tolist():
            yield i, j, self.masks[self.which[j, i]]


def pairs_of(codes: np.ndarray) -> Pairs:
    """`codes`: (N, keys). Half a million pairs of a thousand runs, a key at a time."""
    count, keys = codes.shape
    earlier = np.tri(count, k=-1, dtype=bool)
    places, masks = np.zeros(earlier.sum(), dtype=np.int64), [0]
    for start in range(0, keys, WORD):
        bits = np.zeros((count, count), dtype=np.int64)
        for k, column in enumerate(codes.T[start : start + WORD]):
            known = column != UNKNOWN
            differs = (column[:, None] != column) & known[:, None] & known
            bits |= differs.astype(np.int64) << k
        words, these = np.unique(bits[earlier], return_inverse=True)
        found, places = np.unique(places * len(words) + these, return_inverse=True)
        parts = np.stack(np.divmod(found, len(words)), axis=1).tolist()
        masks = [masks[before] | int(words[now]) << start for before, now in parts]
    which = np.full((count, count), -1)
    which[earlier] = places
    return Pairs(masks, which)


def _edges(pairs: Pairs) -> list[tuple[int, int, int]]:
    """(i, j, keys): each run j beside the first run before it that differs by an elementary set.

    Of sets that share a key only the first is taken: what differs from the baseline is compared
    with the baseline, and not also with everything else that does.
    """
    elementary: list[int] = []
    for mask in sorted(filter(None, pairs.masks), key=int.bit_count):
        if not any(known & mask == known for known in elementary):
            elementary.append(mask)
    wanted, edges = set(elementary), []
    taken: dict[int, int] = {}
    for i, j, mask in pairs.that(wanted.__contains__):
        if not mask & taken.get(j, 0):
            taken[j] = taken.get(j, 0) | mask
            edges.append((i, j, mask))
    return edges


def _repeats(pairs: Pairs) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    of: dict[int, int] = {}
    for i, j, _ in pairs.that(lambda mask: not mask):
        if j not in of:
            first = of[j] = of.get(i, i)
            groups.setdefault(first, [first]).append(j)
    return list(groups.values())


def _predictions(runs: list[Run], pairs: Pairs, apart: int) -> list[tuple[int, int]]:
    """Each measured run with the simulated ones that differ from it in nothing but `apart`."""
    found = []
    for i, j, _ in pairs.that(lambda mask: bool(mask) and not mask & ~apart):
        one, other = (i, j) if runs[i].source == "measured" else (j, i)
        if runs[one].source == "measured" and runs[other].source in SIMULATED:
            found.append((one, other))
    return found
