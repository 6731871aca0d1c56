"""docs/results/answers.md: each of its numbers is found in a ledger, or in a publication that it
names."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

from experiments.ask.evidence import Run, value_at
from experiments.ask.quantity import SIGNS, Quantity
from experiments.lab.node_bytes import leaving

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results"
BETWEEN_NODES = re.compile(r"ranks\[\]\.communication.* rings that cross nodes of (\d+)")
TAGGED = re.compile(r"\[([mtpf])\]")


def recomputed(number: dict[str, Any], ledgers: dict[str, Any]) -> float:
    """A number from what holds it: a place in a ledger, or its parts."""
    if "parts" in number:
        return SIGNS[number["where"]]([recomputed(part, ledgers) for part in number["parts"]])
    if number["run"] not in ledgers:  # a publication, or a file of the repository
        assert number["source"] in ("published", "formula"), number
        return number["value"]
    if between := BETWEEN_NODES.fullmatch(number["where"]):
        run = Run("", ledgers[number["run"]], number["run"], number["source"])
        return leaving(run, int(between[1])).value
    found = value_at(ledgers[number["run"]], number["where"])
    assert found is not None, number
    return found


def test_every_number_of_the_document_is_found() -> None:
    """Each tagged number of docs/results/answers.md is kept, and each that is kept is in a
    ledger."""
    kept = json.loads(gzip.decompress((DOCS / "answers" / "evidence.json.gz").read_bytes()))
    shown: set[str] = set()
    for numbers in kept["numbers"].values():
        assert numbers
        for number in numbers:
            assert recomputed(number, kept["ledgers"]) == number["value"], number["label"]
            fields = {k: number[k] for k in ("label", "value", "unit", "source", "run")}
            shown.add(str(Quantity(**fields)))
    # from the first question on: before it stands the legend
    text = (DOCS / "answers.md").read_text().partition("\n## ")[2]
    places = list(TAGGED.finditer(text))
    for place in places:
        line = text[text.rfind("\n", 0, place.start()) + 1 : place.end()]
        in_a_head = text[place.end() :].startswith(" |") and not re.search(r"\d \S* ?\[.\]$", line)
        assert in_a_head or any(line.endswith(number) for number in shown), line[-60:]
    assert len(places) > 200
