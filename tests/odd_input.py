"""Values that nobody meant, for tests of what the program makes of them."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

drawn = settings().max_examples  # 100, or what --hypothesis-profile says
many = settings(
    max_examples=drawn * 3 // 5,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(many, max_examples=drawn * 3 // 20)  # of what takes tenths of a second
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NASTY = [
    *("", "null", "-1", "0", "1", "2", "7", "1e30", "-1e-30", "nan", "inf", "true", "1.5", "64"),
    *("[]", "[1,2]", "{}", "{a: 1}", "${seed}", "${nothing}", "${oc.env:NOTHING}", "'", '"', "\\"),
    *("a b", "é", "../..", "/", "1000000000000000000000", "fp32", "by_hand", "auto", "x" * 300),
    *("\n", "\x85", "\u2028", "0\n0"),
]
values = st.sampled_from(NASTY) | st.text(max_size=8).filter(lambda s: "\0" not in s)


def as_bytes(text: str) -> bytes:
    return text.encode(errors="replace")


def one_line(error: Exception) -> None:
    assert str(error) and "\n" not in str(error)
