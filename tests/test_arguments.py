"""KEY=VALUE arguments of commands without a configuration of Hydra's."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.arguments import key_values
from experiments.refused import Refused

TAKES = "RUN, cluster=NAME|FILE, out=DIR, rows=NUMBER, --json"


def test_a_run_may_have_an_equals_sign_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    words, given = key_values("replay", TAKES, ["runs/lr=0.1 (2)", "lr=0.1", "--json", "out=a=b"])
    assert words == ["runs/lr=0.1 (2)", "lr=0.1"] and given == {"out": "a=b"}


def test_the_value_of_a_file_may_begin_with_a_tilde() -> None:
    _, given = key_values("replay", TAKES, ["cluster=~/c.yaml", "out=~", "rows=~"])
    home = str(Path.home())
    assert given == {"cluster": f"{home}/c.yaml", "out": home, "rows": "~"}


@pytest.mark.parametrize("argument", ["clustr=x", "cluster=", "-x", "--json=1", "other=/a/b"])
def test_another_argument_is_refused(argument: str) -> None:
    with pytest.raises(Refused, match="replay takes RUN, cluster="):
        key_values("replay", TAKES, [argument])
