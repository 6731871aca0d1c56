"""./launch.sh report: one page, all in it, that reads and works in a browser with no network."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pytest

from costs import trace as traces
from costs.ledger import MEMORY_PARTS
from costs.trace import MemorySample, Trace
from experiments.__main__ import main
from tests.browser import opened
from tests.made_runs import a_run
from tests.test_pictures import a_step

WIDTHS = (400, 1400)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with a trace, another precision, a simulation, and a ledger that is damaged."""
    folder = tmp_path_factory.mktemp("report")
    a_run(folder / "runs" / "a")
    a_run(folder / "runs" / "b<i>", {"precision": "bf16"}, step_s=0.05)
    a_run(folder / "runs" / "like", {"cluster.name": "laptop"}, step_s=0.12, source="formula")
    (a_run(folder / "runs" / "damaged") / "ledger.json").write_text("{")
    samples = [
        MemorySample(rank, time, dict.fromkeys(MEMORY_PARTS, size))
        for rank in (0, 1)
        for time, size in ((0.0, 1_000_000), (0.1, 2_000_000 + rank))
    ]
    traces.write(folder / "runs" / "a" / "trace.json.gz", Trace(a_step(4), {}, samples))
    out = folder / "report.html"
    assert main(["report", str(folder / "runs"), f"out={out}"]) == 0
    return out


class Page(html.parser.HTMLParser):
    """What is in a page: tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_it_is_one_file_that_names_no_other(report: Path) -> None:
    page = Page(report.read_text())
    for tag, attributes in page.tags:
        for key in ("src", "href"):
            value = attributes.get(key) or "#"
            assert value.startswith(("#", "data:")), f"<{tag} {key}={value}>"
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy and policy.startswith("default-src 'none'")
    assert report.read_text().count("plotly.js v") == 1, "its script, once"


def test_tables_are_labelled(report: Path) -> None:
    page = Page(report.read_text())
    tables = len(page.all("table"))
    assert tables == len(page.all("caption")) >= 6
    heads = [th for th in page.all("th") if th.get("scope") == "col"]
    assert len(heads) == len(page.all("button")) and all(th["aria-sort"] == "none" for th in heads)
    assert [th["scope"] for th in page.all("th") if th.get("scope") != "col"].count("row") > 10
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    labels = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert labels <= ids
    assert all(a["role"] == "img" for _, a in page.tags if "data-plot" in a)


def test_what_it_says(report: Path) -> None:
    text = report.read_text()
    assert "b&lt;i&gt;" in text and "b<i>" not in text, "a name is no markup"
    assert "damaged/ledger.json: not a ledger" in text
    assert "formula on laptop" in text and "+20.0%" in text
    found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    figures = [json.loads(one) for one in found]
    assert len(figures) == 8, "time, memory, bytes, two of losses, errors, timeline, its memory"
    (predicted,) = figures[5]["data"]
    rows = text.partition(">measured beside simulated<")[2].partition("</table>")[0].count("<tr>")
    assert len(predicted["y"]) == len(set(predicted["y"])) == rows - 1, "a bar a row of its table"
    assert predicted["x"][predicted["y"].index("step")] == pytest.approx(20.0)
    kinds = {bar["name"]: bar for bar in figures[6]["data"]}
    assert {"forward", "backward", "idle", "exposed communication"} <= set(kinds)
    assert kinds["forward"]["base"][:2] == [0.0, 100.0], "milliseconds"
    held = figures[7]["data"][0]["y"]
    assert held == [1.0, 2.000001], "of the fullest rank, megabytes"


# what a name or a ledger's text may try: a script, an image, a link, an end of the script around it
ATTACKS = ("</script><script>window.broken=1</script>", "<img src=x onerror=window.broken=2>")
LINK = "<a href='https://evil.example'>x</a>\u202e\x1b[2J"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of runs whose names, keys and messages are markup."""
    runs = tmp_path_factory.mktemp("hostile") / "runs"
    for number, attack in enumerate(ATTACKS):
        name = attack.replace("/", "\u2215")  # no folder has a / in its name
        key = {f"optimizer.{attack}": number, "optimizer.name": f"{attack}{LINK}"}
        a_run(runs / name, key, facts={"torch": f"{number}{attack}"})
    a_run(runs / "predicted", {"cluster.name": ATTACKS[0] + LINK}, source="formula")
    (a_run(runs / f"damaged{LINK.replace('/', '')}") / "ledger.json").write_text("{")
    odd = a_step(2)
    odd[0].kind, odd[-1].args["axis"] = "forward", ATTACKS[1]
    first = runs / ATTACKS[0].replace("/", "\u2215")
    traces.write(first / "trace.json.gz", Trace(odd, {}, []))
    assert main(["report", str(runs), f"out={runs.parent / 'report.html'}"]) == 0
    return runs.parent / "report.html"


def test_text_of_others_is_no_markup(hostile: Path) -> None:
    text = hostile.read_text()
    page = Page(text)
    assert len(page.all("script")) == 2 + len([1 for _, a in page.tags if "data-plot" in a])
    assert not page.all("img") and all(a["href"].startswith("#") for a in page.all("a"))
    assert "window.broken" in text, "it is there, as words"
    found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    tags = set(re.findall(r"<[^>]*>", "".join(map(str, map(json.loads, found)))))
    assert tags <= {"<br>"}, "plotly.js takes tags in a text for tags"
    own, _, _ = text.partition("plotly.js v")
    assert "\u202e" not in own and "\x1b" not in own


@pytest.mark.slow
def test_no_text_of_others_runs_or_fetches(hostile: Path) -> None:
    with opened(hostile.as_uri(), 1400) as found:
        page = found.page
        page.wait_for_selector("figure:last-of-type .main-svg")
        assert page.evaluate("window.broken") is None and not found.errors
        assert page.locator(".plot a[*|href]").count() == 0
        assert {url for url in found.requests if not url.startswith(("data:", "blob:"))} == {
            hostile.as_uri()
        }


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_it_works_in_a_browser_without_a_network(report: Path, width: int) -> None:
    with opened(report.as_uri(), width) as found:
        page = found.page
        page.wait_for_selector("figure:last-of-type .main-svg")
        assert page.locator(".plot .main-svg").count() >= 8
        assert found.errors == []
        assert [url for url in found.requests if not url.startswith(("data:", "blob:"))] == [
            report.as_uri()
        ]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for plot in page.locator(".plot").all():
            box = plot.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width


@pytest.mark.slow
def test_tables_sort_by_mouse_and_keyboard(report: Path) -> None:
    with opened(report.as_uri(), 1400) as found:
        page = found.page
        table = page.locator("table").first
        head = table.locator("thead th", has_text="step")
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        steps = numbers(table, 2)
        assert steps == sorted(steps) and len(steps) == 3
        head.locator("button").focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "descending"
        assert numbers(table, 2) == steps[::-1]
        names = table.locator("thead th", has_text="run")
        names.locator("button").click()
        assert names.get_attribute("aria-sort") == "ascending"
        assert head.get_attribute("aria-sort") == "none"
        found_names = table.locator("tbody tr td:nth-child(2)").all_inner_texts()
        assert [name.partition(":")[0] for name in found_names] == ["a", "b<i>", "like"]


def numbers(table, column: int) -> list[float]:  # type: ignore[no-untyped-def]
    cells = table.locator(f"tbody tr > :nth-child({column + 1})").all()
    return [float(cell.get_attribute("data-value")) for cell in cells]


def test_bad_input_is_one_line(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(report.parent / "runs" / "a")
    nowhere = report.parent / "no" / "page.html"
    for argv, why in (
        ([run, "--json"], "--format=json: report writes HTML"),
        ([run, f"out={nowhere}"], "No such file"),
        ([], "report takes at least one run"),
    ):
        assert main(["report", *argv]) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1
