"""Free words: the questions that are nearest to them, and the model, cluster and number in them."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from experiments.predict import clusters
from experiments.predict.models import load_all as load_models
from minigpt.config import ModelConfig

# words that say nothing of what is asked
COMMON_TEXT = """
a an and are as at be best by can do does each for from get have how i if in is it its large many me
much my of on or should tell than that the them there this to train training use was we what when
where which why will with would you your
"""
COMMON = frozenset(re.findall(r"\w+", COMMON_TEXT))
ALIKE = 0.8  # of difflib: memroy is memory
NEAR_SIZE = 1.35  # a model is taken for one that is not further off than this
SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*(b|bn|m|t)\b(?!atch)", re.IGNORECASE)
THOUSANDS = {"m": 1e6, "b": 1e9, "bn": 1e9, "t": 1e12}
DEVICES = ("gpu", "gpus", "chips", "devices", "cards", "accelerators", "ranks")


def words_of(text: str) -> list[str]:
    """Lower case, without what says nothing."""
    return [w for w in re.findall(r"[a-z0-9]+", text.lower()) if w not in COMMON]


def nearest(text: str, questions: dict[str, str]) -> list[str]:
    """Names of questions, the likeliest first; none where no word is shared.

    `questions`: name -> words that speak of it. A word counts more the fewer questions have it
    (Sparck Jones 1972), twice where it is in the name, and nearly as much where it is written
    nearly alike.
    """
    named = {name: words_of(name) for name in questions}
    known = {name: [*named[name], *words_of(about)] for name, about in questions.items()}
    scores: dict[str, float] = {}
    for asked in set(words_of(text)):
        likeness = {name: _likeness(asked, words) for name, words in known.items()}
        have = sum(1 for value in likeness.values() if value)
        for name, value in likeness.items():
            if value:
                rarity = math.log(1 + len(known) / have)
                twice = 1 + (asked in named[name])
                scores[name] = scores.get(name, 0.0) + twice * value * rarity
    return sorted(scores, key=lambda name: -scores[name])


def _likeness(asked: str, words: list[str]) -> float:
    if asked in words:
        return 1.0
    if len(asked) < 4:
        return 0.0
    stem = asked.rstrip("s")
    near = difflib.get_close_matches(stem, [w.rstrip("s") for w in words], 1, ALIKE)
    return difflib.SequenceMatcher(None, stem, near[0]).ratio() if near else 0.0


@dataclass(frozen=True)
class Wanted:
    """What a search needs, of what the words say."""

    model: str | None
    cluster: str | None
    gpus: int | None

    @property
    def complete(self) -> bool:
        return None not in (self.model, self.cluster, self.gpus)

    @property
    def overrides(self) -> tuple[str, ...]:
        assert self.complete
        return (f"model={self.model}", f"cluster={self.cluster}", f"gpus={self.gpus}")


def wanted(text: str) -> Wanted:
    """ "70B on 512 H100": llama3_70b, h100, 512."""
    cluster = cluster_in(text)
    rest = text
    for size in SIZE.finditer(text):
        rest = rest.replace(size[0], " ")
    return Wanted(model_in(text), cluster, _devices_in(rest, cluster))


@lru_cache
def model_configs() -> dict[str, ModelConfig]:
    """Each model of configs/model that is not made for a laptop."""
    return {name: m for name, m in load_models().items() if m.parameters > 5e7}


@lru_cache
def models() -> dict[str, int]:
    """Their parameters."""
    return {name: model.parameters for name, model in model_configs().items()}


def model_in(text: str) -> str | None:
    """By name, or by size: the nearest, where one is near."""
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    named = [name for name in models() if name.replace("_", "") in plain]
    if named:
        return max(named, key=len)
    for size in SIZE.finditer(text):
        if re.match(r"\s*(tokens|batch)", text[size.end() :], re.IGNORECASE):
            continue
        count = float(size[1]) * THOUSANDS[size[2].lower()]
        off = {name: abs(math.log(n / count)) for name, n in models().items()}
        best = min(off, key=lambda name: off[name])
        if off[best] <= math.log(NEAR_SIZE):
            return best
    return None


def cluster_in(text: str) -> str | None:
    """The cluster whose name the words hold most of; of several the one with most memory."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    words += ["".join(pair) for pair in pairwise(words)]
    words += [word.removesuffix("s") for word in words]  # 512 H100s
    words += [w.removesuffix("b") for w in words if re.fullmatch(r"\d+gb", w)]  # 80GB is 80g
    best: tuple[float, ...] = ()
    found = None
    for name in clusters.names():
        parts = name.split("_")
        held = [part in words for part in parts]
        if not (held[0] or name.replace("_", "") in words):
            continue
        if parts[0] == "ethernet" and not all(held):
            continue
        memory = clusters.load(name).device.memory_bytes
        # a part that no word asks for makes it a special kind, unless all of the family are
        rank = (sum(held), name == parts[0], memory)
        if rank > best:
            best, found = rank, name
    return found


def _devices_in(text: str, cluster: str | None) -> int | None:
    """The number before the cluster's name or a word for devices; nodes times their size; or the
    only number."""
    text = text.lower().replace(",", "")
    family = re.escape((cluster or "").split("_")[0])
    names = "|".join([*DEVICES, *([family] if family else [])])
    nodes = re.search(r"(\d+)\s*nodes?", text)
    if nodes:
        each = re.search(r"nodes?\s*(?:of|with|x)\s*(\d+)", text)
        if not each and cluster is None:
            return None
        size = int(each[1]) if each else clusters.load(cluster or "").node_size
        return int(nodes[1]) * size
    named = re.search(rf"(?<![\w.])(\d+)\s*(?:x\s*)?(?:{names})", text)
    if named:
        return int(named[1])
    numbers = re.findall(r"(?<![\w.])(\d+)(?![\w.])", text)
    return int(numbers[0]) if len(numbers) == 1 else None
