"""The page of a tiny race: complete, self-contained, honest about ties, and alive in a browser."""

import copy
import importlib
import json
import math
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest
import torch

import cnf
from cnf.race import verdict
from cnf.race.report import write_report

racing = importlib.import_module("cnf.race.compare")  # the name is the function's too
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SECTIONS = ["verdict", "winners", "scores", "pictures", "animations", "measured"]


class Page(HTMLParser):
    """What a page consists of: ids, texts, addresses, and whether tags close in order."""

    VOID = {"meta", "link", "img", "br", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loads, self.links, self.texts, self.tags = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.loads += [
            attrs[key] for key in ("src", "href", "srcset") if key in attrs and tag != "a"
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.texts.append(data)


def quick_race(contestants, data, **options):
    """A real race, a few steps long, judged on few points and without the slow classifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(racing, "VALIDATION_POINTS", 100)
        return racing.compare(
            data, contestants, steps=4, progress=False, test_points=300, **options
        )


@pytest.fixture(scope="module")
def results():
    names = ["cnf-flow-matching", "realnvp"]
    return quick_race(names, "moons", seeds=(0, 1), w2_points=200)


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    return write_report(results, tmp_path_factory.mktemp("race"))


@pytest.fixture
def edited(results, tmp_path, monkeypatch):
    """Results that a test may change, and their page without the pictures' cost."""
    monkeypatch.setattr("cnf.race.report.save_figures", lambda *_: {})
    mine = copy.copy(results)
    mine.entries = [copy.copy(entry) for entry in results.entries]
    for entry in mine.entries:
        entry.scores, entry.log_prob = dict(entry.scores), []
    return mine, lambda: Page(write_report(mine, tmp_path).read_text())


def test_page_has_every_section_contestant_and_number(page, results):
    parsed = Page(page.read_text())
    assert [name for name in parsed.ids if name in SECTIONS] == SECTIONS
    for entry in results.entries:
        assert entry.title in parsed.text
    assert "The race on moons" in parsed.text and "2 seeds" in parsed.text
    assert "Gap to the true density" in parsed.text and "torch" in parsed.text
    assert (page.parent / "results.csv").exists() and (page.parent / "results.json").exists()
    assert "standardized" not in parsed.text  # distances of a density keep its unit
    assert "0000000" not in parsed.text and "nan" not in parsed.text.lower().split()


def test_page_requests_nothing(page):
    text = page.read_text()
    parsed = Page(text)
    assert len(parsed.loads) >= 8 and all(load.startswith("data:") for load in parsed.loads)
    assert parsed.links == ["results.csv", "results.json", "figures/"]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", text)


def test_pictures_keep_their_size_and_have_words_for_those_who_cannot_see(page):
    images = [attrs for tag, attrs in Page(page.read_text()).tags if tag == "img"]
    pictures = [image for image in images if "width" in image]
    assert len(pictures) == 7
    assert all(image["alt"] and int(image["width"]) > 200 for image in pictures)


def test_budget_that_patience_may_have_ended_is_the_most_of_each(edited):
    results, written = edited
    assert "4 steps of training each" in written().text
    results.settings = {**results.settings, "patience": 2}
    text = written().text
    assert "· at most 4 steps of training each ·" in text
    assert "at most 4 steps, or until 2 of 8 validations bring nothing better" in text


def test_hostile_title_is_text(edited):
    results, written = edited
    for entry in results.of("realnvp"):
        entry.title = "<script>alert(1)</script> & **b**"
    results.data = '"><img src=x>'
    page = written()
    assert "<script>alert(1)</script>" in page.text  # seen as it is, not run
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert all(load.startswith("data:") for load in page.loads)


def scores_of(results, name, **scores):
    for entry, *values in zip(results.of(name), *scores.values(), strict=True):
        entry.scores.update(zip(scores, values, strict=True))


@pytest.mark.parametrize(
    ("gaps", "tied"),
    [
        ([(0.10, 0.10), (0.11, 0.11)], True),  # apart 0.01, two errors are 2·√2·0.01 = 0.028
        ([(0.10, 0.10), (0.14, 0.14)], False),
        ([(0.10, 0.30), (0.34, 0.34)], True),  # seeds spread: error of the mean 0.1
    ],
)
def test_difference_within_two_errors_is_called_a_tie(edited, gaps, tied):
    results, written = edited
    for name, gap in zip(results.contestants, gaps, strict=True):
        scores_of(results, name, gap=gap, gap_error=(0.01, 0.01))
    sentence = verdict.lead(results)[0]
    assert ("tie" in sentence) == tied and ("came closest" in sentence) == (not tied)
    assert sentence.replace("**", "") in written().text
    best = verdict.contest(results, verdict.contested(results)[0])
    assert (len(best.winners) == 2) == tied


def test_sample_distances_closer_than_their_floor_are_ties(edited):
    results, _ = edited
    floor = results.floor["w2"]
    score = next(s for s in verdict.contested(results) if s.key == "w2")
    first, second = results.contestants
    scores_of(results, first, w2=(2 * floor, 2 * floor))
    scores_of(results, second, w2=(2.9 * floor, 2.9 * floor))
    assert verdict.contest(results, score).winners == [first, second]
    scores_of(results, second, w2=(3.1 * floor, 3.1 * floor))
    assert verdict.contest(results, score).winners == [first]


def test_more_is_better_where_it_is(edited):
    results, _ = edited
    first, second = results.contestants
    scores_of(results, first, ms_per_step=(10.0, 10.0))
    scores_of(results, second, ms_per_step=(10 / 3, 10 / 3))
    pace = next(s for s in verdict.contested(results) if s.key == "steps_per_second")
    assert verdict.contest(results, pace).winners == [second]
    assert "(3× slower)" in verdict.contest(results, pace).note


def test_winner_is_told_what_it_cost(edited):
    results, _ = edited
    first, second = results.contestants
    scores_of(results, first, gap=(0.1, 0.1), ms_sample=(500.0, 500.0))
    scores_of(results, second, gap=(0.9, 0.9), ms_sample=(20.0, 20.0))
    title = results.of(second)[0].title
    assert f"draws samples 25× slower than **{title}**" in verdict.lead(results)[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_contestant_without_a_number_is_named_and_comes_last(edited, bad):
    results, written = edited
    scores_of(results, "realnvp", gap=(bad, 0.0), w2=(bad, 0.0))
    page = written()
    assert "RealNVP has no finite gap" in page.text and "it failed" in page.text
    assert results.failed() == ["realnvp"]
    rows = [
        attrs["data-value"] for tag, attrs in page.tags if tag == "th" and "data-value" in attrs
    ]
    assert rows == ["CNF, flow matching", "RealNVP"]


def test_all_failed_leaves_a_page(edited):
    results, written = edited
    for name in results.contestants:
        scores_of(results, name, gap=(math.nan, math.nan))
    page = written()
    assert "they failed" in page.text and "no contestant has a number here" in page.text


def test_one_seed_is_said_to_be_one(edited):
    results, written = edited
    results.entries = [entry for entry in results.entries if entry.seed == 0]
    results.settings = {**results.settings, "seeds": [0]}
    assert "This is one seed" in written().text


def test_own_points_are_judged_by_likelihood(tmp_path):
    points = torch.randn(900, 5, generator=torch.Generator().manual_seed(0))
    results = quick_race(["realnvp"], points, w2_points=20)
    page = Page(write_report(results, tmp_path).read_text())
    assert "Held-out NLL" in page.text and "held-out points" in page.text
    assert "gap" not in page.text.lower() and "true density of your own points" in page.text
    assert "trajectories" not in page.ids and "animations" not in page.ids
    assert "first four of 5 dimensions" in page.text
    assert "standardized columns" in page.text


def test_the_page_of_a_file_says_which_columns_were_raced(tmp_path):
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "mine.csv"
    rows = [f"{a:.6f},{b:.6f},{'red' if c > 0 else 'blue'}" for a, b, c in x.tolist()]
    file.write_text("\n".join(["age,income,kind", *rows]))
    data = cnf.data.load(str(file), cnf.data.Columns(context=["kind"]))
    results = quick_race(["realnvp"], data, w2_points=20)
    page = Page(write_report(results, tmp_path).read_text())
    assert f"{file}: age, income given kind; 300 rows" in page.text


def test_pictures_lie_beside_the_page(page):
    names = {file.name for file in (page.parent / "figures").iterdir()}
    assert {"density.png", "flow-realnvp.gif", "flow-cnf-flow-matching.gif"} <= names


PROBE_BEFORE = """<script>
window.problems = [];
window.onerror = (message) => { problems.push(String(message)); };
window.onunhandledrejection = (event) => { problems.push(String(event.reason)); };
console.error = console.warn = (...words) => { problems.push(words.join(" ")); };
</script>"""

PROBE_AFTER = """<script>
window.addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#table tbody tr")];
  const column = (n) => rows().map((row) => row.cells[n].dataset.value);
  const heads = [...document.querySelectorAll("#table thead th")];
  const verdict = { columns: [] };
  heads.forEach((head, n) => {
    const seen = [];
    if (head.getAttribute("aria-sort")) heads[0].querySelector("button").click();
    for (let i = 0; i < 2; i++) {
      head.querySelector("button").click();
      seen.push({ sort: head.getAttribute("aria-sort"), values: column(n) });
    }
    verdict.columns.push({ seen, marked: document.querySelectorAll("[aria-sort]").length });
  });
  const pictures = [...document.images].filter((image) => image.hasAttribute("width"));
  verdict.pictures = pictures.map((image) => image.naturalWidth);
  document.querySelector("[data-zoom]").click();
  const zoom = document.querySelector("#zoom");
  verdict.zoomed = zoom.open && zoom.querySelector("img").src === pictures[0].src;
  zoom.close();
  verdict.overflow = document.documentElement.scrollWidth - window.innerWidth;
  verdict.problems = problems;
  document.title = "done";
  document.body.textContent = "";
  document.body.append(Object.assign(document.createElement("pre"), {
    id: "verdict-json", textContent: JSON.stringify(verdict) }));
});
</script>"""


def in_browser(page, tmp_path, width):
    """What the page, with a probe inside, says of itself in a headless Chromium."""
    text = page.read_text().replace("<head>", "<head>" + PROBE_BEFORE, 1)
    copy_of_page = tmp_path / "probed.html"
    copy_of_page.write_text(text.replace("</body>", PROBE_AFTER + "</body>", 1))
    run = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
            "--virtual-time-budget=5000", "--dump-dom", copy_of_page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="verdict-json">(.*?)</pre>', run.stdout, re.DOTALL)
    assert found, run.stderr[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("width", [500, 1280])
def test_page_works_in_a_browser(page, results, tmp_path, width):
    said = in_browser(page, tmp_path, width)
    assert said["problems"] == []
    assert len(said["pictures"]) == 7 and min(said["pictures"]) > 0
    assert said["zoomed"] and said["overflow"] <= 0
    for number, column in enumerate(said["columns"]):
        first, second = column["seen"]
        assert (first["sort"], second["sort"]) == ("ascending", "descending")
        assert column["marked"] == 1
        if number == 0:
            assert first["values"] == sorted(first["values"]) == second["values"][::-1]
            continue
        ups, downs = ([float(v) for v in seen["values"]] for seen in (first, second))
        up, down = ([v for v in values if math.isfinite(v)] for values in (ups, downs))
        assert up == sorted(up) == down[::-1]
        assert all(math.isnan(v) for v in ups[len(up) :] + downs[len(down) :])  # NaN goes last
    assert any("nan" in column["seen"][0]["values"] for column in said["columns"][1:])
