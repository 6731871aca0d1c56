"""The playground: its numbers are simulate's, and the page works in a real browser."""

from __future__ import annotations

import asyncio
import http.client
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.ask.evidence import Evidence
from experiments.overrides import composed
from experiments.playground.answers import Answers, Newest, Results
from experiments.playground.command import LISTS, SLIDERS, moved_by, moved_to
from experiments.playground.guard import OwnPagesOnly
from experiments.playground.plan import Controls, View, choices, view
from experiments.playground.results import results_of
from experiments.playground.speed import moves_of, started
from experiments.playground.svg import joined, passes_of
from simulator.coarse_programs import coarse_timeline
from simulator.plan_times import timeline_of
from tests.browser import opened

START = Controls()
PLACES = [
    START,
    replace(START, pp=1, tp=1, dp_shard=8, dp_replicate=2, zero_stage=3),
    replace(START, schedule="zbv_zero_bubble", activation_checkpointing="full"),
    replace(START, cp=2, dp_shard=2, precision="fp32", sequence_parallel=False),
    replace(START, model="llama3_70b", cluster="a100_80g", tp=8, dp_shard=1, dp_replicate=2),
    replace(START, model="gpt2", cluster="laptop", pp=1, tp=1, seq_len=1024),
    replace(START, pp=1, gradient_sync="micro_batch"),
    replace(START, pp=8, schedule="interleaved_1f1b", tp=1),  # a rank between the ends is fullest
]


@pytest.mark.parametrize("controls", PLACES)
def test_the_command_says_what_the_page_shows(controls: Controls) -> None:
    overrides = shlex.split(controls.command.removeprefix("./launch.sh simulate"))
    assert composed("simulate", tuple(overrides)) == controls.config()
    ledger = Evidence().simulated("same", *overrides).ledger
    shown = view(controls)
    assert shown.step and shown.devices == ledger["layout"]["world_size"]
    for key in ("tokens", "time_s", "memory_bytes", "tokens_per_s", "mfu"):
        assert shown.step[key] == ledger["step"][key], key
    assert shown.verdict == ledger["environment"]["verdict"]


@pytest.mark.parametrize("controls", PLACES)
def test_a_pass_at_a_time_ends_when_all_events_do(controls: Controls) -> None:
    """The coarse timeline against the one that has every operator and message."""
    config = controls.config()
    plan = (config.model, config.layout, config.options)
    fine, coarse = (made(*plan, config.cluster) for made in (timeline_of, coarse_timeline))
    assert coarse.total == pytest.approx(fine.total, rel=0.05)
    assert coarse.programs.keys() == fine.programs.keys()


def test_passes_are_numbered_and_split_where_the_schedule_splits() -> None:
    shown = view(START)
    assert shown.timeline
    passes = list(passes_of(shown.timeline, 0))
    count = START.gradient_accumulation_steps
    for kind in ("forward", "backward"):
        numbers = [p.micro_batch for p in passes if p.kind == kind]
        assert sorted(n for n in numbers if n is not None) == list(range(count))
    split = view(replace(START, schedule="zbv_zero_bubble")).timeline
    assert split
    kinds = [p.kind for p in passes_of(split, 0)]
    # two stages a rank; where nothing lies between them torch runs both halves as one
    assert 0 < kinds.count("backward_weight") <= 2 * count and kinds.count("forward") == 2 * count


def test_short_passes_are_drawn_together() -> None:
    shown = view(START)
    assert shown.timeline
    passes = list(passes_of(shown.timeline, 0))
    assert len(joined(passes, 0.0)) == len(passes)
    assert len(joined(passes_of(shown.timeline, 0), shown.timeline.total)) < len(passes)


def test_what_the_rules_refuse_is_shown() -> None:
    shown = view(replace(START, tp=16))
    assert shown.refused and "n_kv_head" in shown.refused and shown.step is None
    assert shown.refused.split(":")[0] in results_of(shown)["verdict"]
    shown = view(replace(START, gradient_sync="micro_batch"))
    assert shown.refused and "pp" in shown.refused
    many = view(replace(START, gradient_accumulation_steps=256, pp=32, tp=1))
    assert many.timeline is None and many.step


def test_every_choice_of_every_list_is_taken() -> None:
    for key, names in choices().items():
        for name in names[:: 4 if key in ("cluster", "model") else 1]:
            value = int(name) if key == "zero_stage" else name
            shown = view(replace(START, **{key: value}))  # type: ignore[arg-type]
            assert isinstance(shown, View) and (shown.step or shown.refused), (key, name)


def test_the_speed_command_moves_every_control_as_the_page_can() -> None:
    moves = moves_of(START)
    assert {key for key, _ in moves} == {*SLIDERS, *LISTS, "sequence_parallel"}
    assert all(moved_to(START, key, value) != START for key, value in moves)


def test_only_what_a_control_can_say_is_taken() -> None:
    assert moved_to(START, "tp", 8).tp == 8 and moved_to(START, "zero_stage", "3").zero_stage == 3
    assert moved_to(START, "sequence_parallel", False).sequence_parallel is False
    for key, value in (("tp", 3), ("pp", 2**30), ("model", "tiny"), ("command", "x"), ("tp", "8")):
        with pytest.raises(ValueError, match=key):
            moved_to(START, key, value)
    # equal to a number that is allowed, and not one
    for key, value in (("tp", True), ("tp", 8.0), ("zero_stage", 3), ("sequence_parallel", 1)):
        with pytest.raises(ValueError, match=key):
            moved_to(START, key, value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
KEYS = (*SLIDERS, *LISTS, "sequence_parallel")


@given(JSON | st.tuples(st.sampled_from(KEYS), JSON).map(list))
def test_an_event_from_outside_is_a_move_or_is_refused(args: Any) -> None:
    try:
        moved = moved_by(START, args)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        key, value = args
        assert type(getattr(moved, key)) is type(getattr(START, key))
        assert str(getattr(moved, key)) == str(value)


# the position that listed four million ranks: pp 32, cp 8, tp 4, dp 256 x 512
WHOLE_WORLD = replace(
    START,
    model="llama3_70b",
    cluster="b300",
    pp=32,
    cp=8,
    tp=4,
    dp_replicate=256,
    dp_shard=512,
    seq_len=128,
    micro_batch_size=8,
    gradient_accumulation_steps=32,
    activation_checkpointing="full",
)


def test_a_picture_lists_one_rank_of_each_stage_whatever_the_world() -> None:
    shown = view(WHOLE_WORLD)
    assert shown.devices == 2**27 and shown.timeline
    stride = shown.devices // 32
    assert sorted(shown.timeline.programs) == list(range(0, shown.devices, stride))
    ledger = Evidence().simulated("whole world", *shlex.split(WHOLE_WORLD.command)[2:]).ledger
    assert shown.step and shown.step["time_s"] == ledger["step"]["time_s"]


def test_a_newer_position_replaces_the_one_that_waits() -> None:
    begun: list[Controls] = []
    shown: list[Results] = []

    class Slow(Answers):
        def __init__(self) -> None: ...

        async def answer(self, controls: Controls) -> Results:
            begun.append(controls)
            await asyncio.sleep(0)
            return {"command": controls.command}

    async def visit() -> None:
        newest = Newest(Slow(), shown.append)
        await asyncio.gather(*(newest.ask(replace(START, tp=2**i)) for i in range(5)))

    asyncio.run(visit())
    assert [controls.tp for controls in begun] == [1, 16]  # one in work, and the newest
    assert shown[-1] == {"command": replace(START, tp=16).command}


@pytest.mark.slow
def test_a_position_that_fails_is_said_and_the_next_is_answered() -> None:
    answers = Answers()

    async def visit() -> tuple[Results, Results]:
        bad = replace(START, model="no such model")
        return await answers.answer(bad), await answers.answer(START)

    try:
        failed, good = asyncio.run(visit())
    finally:
        answers.close()
    assert "could not be computed: KeyError" in failed["verdict"]
    assert good == results_of(view(START))


PORT = 8642
OURS = [f"{name}:{PORT}" for name in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST")]
FOREIGN = ["evil.example:8642", "127.0.0.1", "127.0.0.1:80", "127.0.0.1.evil.example:8642", ""]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_only_the_page_of_this_server_is_answered(kind: str) -> None:
    async def sent(*headers: tuple[str, str]) -> list[str]:
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append("answered")

        async def send(message: Any) -> None:
            seen.append(f"{message['type']} {message.get('status', '')}".strip())

        pairs = [(name.encode(), value.encode()) for name, value in headers]
        scope = {"type": kind, "headers": pairs}
        await OwnPagesOnly(app, PORT)(scope, send, send)
        return seen

    def status(*headers: tuple[str, str]) -> str:
        return asyncio.run(sent(*headers))[0]

    refused = {"http": "http.response.start 403", "websocket": "websocket.close"}[kind]
    for host in OURS:
        assert status(("host", host)) == "answered"
        assert status(("host", host), ("origin", f"http://{host}")) == "answered"
    for host in FOREIGN:
        assert status(("host", host)) == refused, host
        assert status(("host", OURS[0]), ("origin", f"http://{host}")) == refused, host
    for origin in ("null", f"https://{OURS[0]}", "file://"):
        assert status(("host", OURS[0]), ("origin", origin)) == refused, origin
    assert status() == refused and status(("host", OURS[0]), ("host", OURS[1])) == refused


# what is written on the page: its text, its size in pixels, its contrast with white (WCAG 2, 1.4.3)
TEXTS = """() => [...document.querySelectorAll("main *")].filter((e) =>
  e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
).map((e) => {
  const parts = getComputedStyle(e).color.match(/[0-9.]+/g).slice(0, 3).map((p) => p / 255);
  const [r, g, b] = parts.map((p) => p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4);
  const contrast = 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05);
  return [e.textContent.slice(0, 40), parseFloat(getComputedStyle(e).fontSize), contrast];
})"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A playground on a free port."""
    pytest.importorskip("nicegui")
    with started() as (address, process):
        listening = [
            c.laddr.ip
            for c in psutil.Process(process.pid).net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"]
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_a_browser(address: str, width: int) -> None:
    with opened(address, width) as found:
        page = found.page
        memory, text = page.locator("#n-memory"), page.locator("#result-command")
        memory.wait_for()
        assert START.command in text.inner_text()
        texts = page.evaluate(TEXTS)
        assert len(texts) > 40
        assert not [text for text, pixels, _ in texts if pixels < 11]
        assert not [text for text, _, contrast in texts if contrast < 4.5]
        before = memory.inner_text()
        slider = page.get_by_label(SLIDERS["micro_batch_size"][0])
        slider.focus()
        slider.press("ArrowRight")
        page.wait_for_function(f"document.querySelector('#n-memory').innerText != '{before}'")
        moved = replace(START, micro_batch_size=2)
        assert moved.command in text.inner_text()
        slider.press("ArrowRight")  # it stands where it was put
        page.wait_for_function(
            "document.querySelector('#result-command').innerText.includes('micro_batch_size=4')"
        )
        page.get_by_label("precision").select_option("fp32")
        page.wait_for_function(
            "document.querySelector('#result-command').innerText.includes('precision=fp32')"
        )
        page.get_by_label(SLIDERS["tp"][0]).press("End")
        page.get_by_text("n_kv_head").wait_for()
        assert page.locator("#result-timeline svg").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        names = page.evaluate(
            "[...document.querySelectorAll('input,select,button')].map("
            "e => e.labels?.[0]?.innerText || e.innerText || e.ariaLabel)"
        )
        assert len(names) >= 16 and all(names)
        assert not found.errors
        own = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")
        assert not [url for url in found.requests if not url.startswith(own)]


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport="


def status_of(address: str, path: str, headers: dict[str, str]) -> int:
    """Return the status with which the server answers a request with these headers."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.slow
def test_another_sites_page_reaches_neither_page_nor_socket(address: str) -> None:
    own = urlsplit(address).netloc
    websocket = (SOCKET + "websocket", UPGRADE, 101)
    for path, headers, good in (("/", {}, 200), (SOCKET + "polling", {}, 200), websocket):
        assert status_of(address, path, headers) == good
        assert status_of(address, path, {**headers, "Origin": f"http://{own}"}) == good
        assert status_of(address, path, {**headers, "Host": "evil.example"}) == 403
        assert status_of(address, path, {**headers, "Origin": "http://evil.example"}) == 403


# sends what the page sends for a move, with other arguments
SEND = """(args) => {
  const emit = window.socket.emit.bind(window.socket);
  let seen = null;
  window.socket.emit = (name, message) => { if (name === "event") seen = message; };
  const slider = document.getElementById("tp");
  slider.dispatchEvent(new Event("input", {bubbles: true}));
  window.socket.emit = emit;
  for (const one of args) emit("event", {...seen, args: [JSON.stringify(one)]});
}"""


@pytest.mark.slow
def test_no_event_breaks_a_visitor(address: str) -> None:
    with opened(address, 1400) as found:
        page = found.page
        page.locator("#n-memory").wait_for()
        bad = [["tp", True], ["tp", None], [["tp"], 1], ["tp"], {"tp": 1}, ["model", {}], 7, None]
        page.evaluate(SEND, [*bad, ["tp", 4]])
        text = "document.querySelector('#result-command').innerText"
        page.wait_for_function(f"{text}.includes('layout.tp=4')")
        page.evaluate(SEND, [["tp", 2 ** (i % 5)] for i in range(60)] + [["tp", 8]])
        page.wait_for_function(f"{text}.includes('layout.tp=8')")
        assert not found.errors
