"""docs/results/answers.md: every question of `ask` with its answer, figures and pictures from this
machine.

./launch.sh python -m experiments.ask.answers           half an hour on two cores, then seconds

docs/results/answers/evidence.json.gz has every number with its run and the place in its ledger,
and these
ledgers: a test finds each number of the document there.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from experiments.ask.answer import LEGEND, Answer, Picture, markdown
from experiments.ask.command import PICTURES, answer_to, names, question
from experiments.ask.evidence import Evidence
from experiments.ask.search import answer as search_answer
from experiments.ask.words import wanted
from experiments.document import heading

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
FOLDER = DOCS / "answers"
COMMAND = "./launch.sh python -m experiments.ask.answers"
FREE = "70B on 512 H100"


def main() -> int:
    evidence = Evidence()
    answers = {}
    for name in names():
        print(name, file=sys.stderr, flush=True)
        answers[name] = answer_to(name, evidence)
    lines = head()
    lines += [f"{i}. [{question(n)}](#{n})" for i, n in enumerate([*answers], 1)]
    lines += [f'{len(answers) + 1}. [Free words: "{FREE}"](#free-words)']
    for name, answer in answers.items():
        lines += ["", f'<a id="{name}"></a>', "", *markdown(question(name), answer, _place)]
        lines += ["", f"`./launch.sh ask {name}`"]
    free = search_answer(wanted(FREE), evidence)
    lines += ["", '<a id="free-words"></a>', ""]
    lines += markdown(f'Free words: `./launch.sh ask "{FREE}"`', free, _place)
    (DOCS / "answers.md").write_text("\n".join(lines) + "\n")
    write_evidence({**answers, "free-words": free}, evidence)
    return 0


def head() -> list[str]:
    return [
        *heading("Questions of system design, answered", COMMAND).splitlines(),
        "Sentences are filled from the numbers, and follow them where they come out otherwise on "
        "another machine.",
        "",
        f"Tags: {LEGEND}. A column of one kind says so in its head. What is measured are real "
        "ranks of this machine; what is by formula is the simulator on a cluster of "
        "configs/cluster, whose seconds are fitted to published runs and are off by what "
        "[score.md](score.md) says, while its bytes and memory are held to real ranks by tests.",
        "",
        "Words: *sent* and *wire* are the bytes that a rank sends in a step under ring algorithms, "
        "and what it *hands over* is the size of the tensors. *Peak* is the fullest moment of the "
        "fullest rank, and *saved* the share of a peak that is gone. *Exposed* is the share of a "
        "step in which a rank waits for a message that no compute hides, *bubble* that in which "
        "it waits for a neighbour. *m* is the number of micro-batches of a step. MFU is the "
        "model's flops over the peak of the devices. A layout is named by its axes: "
        "dp_replicate (replicas), dp_shard (ZeRO, FSDP), tp, pp, cp.",
        "",
    ]


def _place(picture: Picture) -> str:
    """Copy a picture to where the document looks for it."""
    FOLDER.mkdir(exist_ok=True)
    shutil.copyfile(picture.at(PICTURES), FOLDER / f"{picture.name}.png")
    return f"answers/{picture.name}.png"


def write_evidence(answers: dict[str, Answer], evidence: Evidence) -> None:
    """What the document's numbers rest on."""
    numbers = {name: [n.said() for n in answer.numbers] for name, answer in answers.items()}
    ledgers = {run: plainly(ledger) for run, ledger in evidence.ledgers.items()}
    text = json.dumps({"numbers": numbers, "ledgers": ledgers}, separators=(",", ":"))
    # without a time in its head, so that the same ledgers are the same file
    (FOLDER / "evidence.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def plainly(ledger: dict[str, Any]) -> dict[str, Any]:
    """A ledger without what names this machine's kernel and folders, or says where a cluster's
    numbers are from, which its file does."""
    made = dict(ledger)
    if "environment" in made:
        made["environment"] = {k: v for k, v in made["environment"].items() if k != "platform"}
    if "config" in made:
        made["config"] = {k: v for k, v in made["config"].items() if k not in ("run", "cluster")}
    return made


if __name__ == "__main__":
    sys.exit(main())
