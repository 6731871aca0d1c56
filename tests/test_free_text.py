"""Paths and text that people type: every value that a shell hands over arrives as it is."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.__main__ import main
from experiments.compose import SCHEMAS, configs_of, jobs_of
from experiments.config import TrainConfig
from experiments.free_text import free_keys, path_in, quoted
from experiments.refused import Refused
from tests.configs import compose
from tests.odd_input import few, many

PATHS = {
    "train": {"data.path", "data.cache", "data.tokenizer", "run.dir", "resume", "init"},
    "generate": {"run"},
    "export": {"run", "out"},
    "simulate": {"data.path", "data.cache", "data.tokenizer", "run.dir", "resume", "init"},
    "search": {"plot"},
}
NAMES = [
    "lr=0.1", "a b", "\u00fc/\u65e5", "#1", "a&b;c", "!x", "it's", '"x', "'", "a,b", "[1]",
    "{a: 1}", "(1)", "$x", "$", "a:b", "x\\", "\\'", "a\\b", "\\\\", "007", "1e3", "true", "-x",
    "%", "^*?", "a=b=c", "@", "`x`", "|", "~x/y", "x ", " x", "choice(a)", "???x", "+x", "null1",
]  # fmt: skip
# what stands for something else: Hydra's null and quotes, the home folder, OmegaConf's ${...}
names = st.text(min_size=1, max_size=12).filter(
    lambda s: s.lower() != "null" and s != "???" and "\0" not in s and "${" not in s
    and not s.startswith("~") and not (s[0] in "'\"" and s[-1] == s[0])
)  # fmt: skip


@pytest.mark.parametrize("command", PATHS)
def test_the_schema_says_which_keys_are_paths(command: str) -> None:
    found = {name for name, key in free_keys(SCHEMAS[command]).items() if key.path}
    assert found == PATHS[command]


KEYS = ("run.dir", "data.path", "data.cache", "init", "logging.project")


@pytest.mark.parametrize("at", range(0, len(NAMES), len(KEYS)))
def test_a_path_may_be_any_name(at: int) -> None:
    typed = dict(zip(KEYS, NAMES[at:], strict=False))
    config = compose("data=text", "+data.path=x", *(f"{k}={v}" for k, v in typed.items()))
    dotted = {key: attrgetter(key)(config) for key in typed}
    assert dotted == typed


@given(names)
@few
def test_any_path_arrives_as_it_is(path: str) -> None:
    assert compose(f"run.dir={path}").run.dir == path


@given(names)
@example(path="\\'")
@many
def test_a_sweeps_folder_is_the_path_that_was_typed(path: str) -> None:
    _, _, value = quoted(f"run.dir={path}", TrainConfig).partition("=")
    assert path_in(value) == Path(path)


def test_a_leading_tilde_is_the_home_folder() -> None:
    config = compose("data=text", "data.path=~/x.txt", "run.dir='~/y z'")
    assert config.data.path == str(Path.home() / "x.txt")
    assert config.run.dir == str(Path.home() / "y z")
    assert path_in('"~/a b"') == Path.home() / "a b"


def test_other_commands_take_any_path_too() -> None:
    (made,) = configs_of("generate", ["run=runs/lr=0.1 (2)", "prompt=a,b"])
    assert (made.run, made.prompt) == ("runs/lr=0.1 (2)", "a,b")
    (made,) = configs_of("export", ["run=#1", "out=~/x y"])
    assert (made.run, made.out) == ("#1", str(Path.home() / "x y"))


def test_what_hydra_means_by_a_value_it_still_means() -> None:
    assert compose("resume=null").resume is None
    assert compose("run.dir='a b'").run.dir == "a b"
    assert compose("run.dir=runs/${seed}-x", "seed=3").run.dir == "runs/3-x"


def test_a_comma_separates_in_a_sweep_except_in_prose_and_quotes() -> None:
    argv = ["-m", "data.path=a b,it's", "sample.prompt=x, y", "run.dir='r,1'"]
    jobs = jobs_of(argv)
    assert jobs is not None
    made = [compose("data=text", *job) for job in jobs]
    assert [config.data.path for config in made] == ["a b", "it's"]
    assert {(c.sample.prompt, c.run.dir) for c in made} == {("x, y", "r,1")}
    assert len(jobs_of(["-m", "data.path=choice(a,b,c)"]) or []) == 3


@pytest.mark.parametrize("key", sorted(free_keys(TrainConfig)))
def test_an_empty_text_is_refused(key: str) -> None:
    with pytest.raises((Refused, ValueError)) as refused:
        compose(f"{key}=", "data=text", *([] if key == "data.path" else ["data.path=x"]))
    assert str(refused.value).startswith(key) and "\n" not in str(refused.value)


def test_a_run_is_made_where_the_path_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.1", "a b,c", "\u00fc/\u65e5", "it's #1 & [x]; $y!"):
        assert main([f"run.dir={name}", "launch=dry", "data=generated"]) == 0, name
        assert (tmp_path / name / "config.yaml").is_file()
