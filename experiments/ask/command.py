"""./launch.sh ask [QUESTION]: questions of system design, answered with measured numbers.

./launch.sh ask                             the questions
./launch.sh ask where-does-memory-go        one of them; what it measures is kept in runs/ask
./launch.sh ask "70B on 512 H100"           a model, a cluster and a number: the best plan
./launch.sh ask "why is my loss nan"        the nearest questions
./launch.sh ask --all                       all of them;  --again measures anew;  --json
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

from experiments.ask.answer import Answer, show
from experiments.ask.evidence import Evidence, RunFailed
from experiments.ask.kept import KEPT
from experiments.ask.words import nearest, wanted
from experiments.console import make_console
from experiments.outside_text import complain
from experiments.refused import Refused

FOLDER = Path(__file__).resolve().parents[1] / "questions"
PICTURES = KEPT / "pictures"
OPTIONS = ("--json", "--all", "--again")
SHOWN = 3  # questions that free words are near to


def command(argv: list[str]) -> int:
    """List, or answer."""
    options = [a for a in argv if a.startswith("-")]
    unknown = [o for o in options if o not in OPTIONS]
    if unknown:
        raise Refused(f"{unknown[0]}: ask takes {', '.join(OPTIONS)}, or a question")
    as_json, words = "--json" in options, [a for a in argv if a not in options]
    known = names()
    chosen = list(known) if "--all" in options else words
    if not chosen:
        list_questions(as_json)
        return 0
    if all(word in known for word in chosen):
        try:
            answer_all(chosen, Evidence("--again" in options), as_json)
        except RunFailed as failed:
            complain(failed)
            return 1
        return 0
    return free_words(" ".join(words), as_json)


def names() -> dict[str, str]:
    """Each question's name and its module, in the order of `ORDER`."""
    found = {
        path.stem.replace("_", "-"): f"experiments.questions.{path.stem}"
        for path in sorted(FOLDER.glob("*.py"))
        if path.stem != "__init__"
    }
    return dict(sorted(found.items(), key=lambda item: module(item[1]).ORDER))


def module(name: str) -> ModuleType:
    """A question's file: QUESTION, ORDER, WORDS and answer(evidence)."""
    return importlib.import_module(name)


def question(name: str) -> str:
    """In words."""
    return module(names()[name]).QUESTION


def list_questions(as_json: bool) -> None:
    known = {name: question(name) for name in names()}
    if as_json:
        listed = [{"name": name, "question": text} for name, text in known.items()]
        print(json.dumps({"questions": listed}, indent=1))
        return
    console = make_console()
    for name, text in known.items():
        console.print(name, style="bold")
        console.print(f"  {text}", soft_wrap=True)
    console.print('\n./launch.sh ask NAME, or free words: ./launch.sh ask "70B on 512 H100"')


def answer_to(name: str, evidence: Evidence) -> Answer:
    """The answer to one question."""
    return module(names()[name]).answer(evidence)


def answer_all(chosen: list[str], evidence: Evidence, as_json: bool) -> None:
    """Print the answers; several as JSON are a list."""
    said, console = [], make_console()
    for name in chosen:
        answer, text = answer_to(name, evidence), question(name)
        if as_json:
            said.append(answer.said(name, text))
        else:
            show(console, name, text, answer, PICTURES)
    if as_json:
        print(json.dumps(said[0] if len(said) == 1 else said, indent=1))


def free_words(text: str, as_json: bool) -> int:
    """Search where the words say enough for it; name the nearest questions."""
    about = {name: f"{question(name)} {module(path).WORDS}" for name, path in names().items()}
    near = nearest(text, about)[:SHOWN]
    asked = wanted(text)
    if asked.complete:
        from experiments.ask.search import answer

        found, title = answer(asked, Evidence()), f"{text}: which plan is the best?"
        if as_json:
            print(json.dumps({**found.said("search", title), "nearest": near}, indent=1))
        else:
            show(make_console(), "search", title, found, PICTURES)
    elif as_json:
        print(json.dumps({"nearest": [{"name": n, "question": question(n)} for n in near]}))
    elif not near:
        raise Refused(f"{text}: no question is near; ./launch.sh ask lists them")
    if not as_json and near:
        print("the nearest questions:")
        for name in near:
            print(f"  ./launch.sh ask {name}\n      {question(name)}")
        missing = [k for k, v in vars(asked).items() if v is None]
        if len(missing) < 3 and missing:
            print(f'a search needs a {" and a ".join(missing)} too, as "70B on 512 H100" has them')
    return 0
