"""The pages in a real Chromium, by day and by night, wide and narrow."""

import base64
import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from launch.compare import main
from pipeline.evaluation.plots import plot_accuracy, plot_layer_sparsity
from pipeline.evaluation.report import write_report
from pipeline.evaluation.summary import Sample
from tests.unit.test_compare import CONFIG, write_run
from tests.unit.test_page import ATTACKS
from tests.unit.test_plots import ACCURACY
from tests.unit.test_report import PER_LAYER, description, full_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; run make system-deps"),
]

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=5000",
)  # fmt: skip
LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images].map(i => [i.complete && i.naturalWidth, i.currentSrc]);
  const root = document.documentElement, found = document.createElement("pre");
  const tables = [...document.querySelectorAll("table")];
  found.id = "found";
  found.textContent = JSON.stringify({
    images, width: innerWidth, page: root.scrollWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    tables: tables.map(t => t.getBoundingClientRect().width),
  });
  document.body.append(found);
});</script>"""


def opened(page, profile, *flags):
    """What Chromium makes of a page: its DOM, and what it wrote to the console."""
    done = subprocess.run(
        [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


def looked_at(page, profile, *flags):
    """What a script sees in a copy of the page that lets it run."""
    text = page.read_text().replace("default-src", "script-src 'unsafe-inline'; default-src", 1)
    copy = page.with_name("looked_at.html")
    copy.write_text(text.replace("</head>", f"{LOOK}</head>", 1))
    dom, console = opened(copy, profile, *flags)
    assert console == []
    return json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', dom)[1]))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with two pictures, in which every model tries to break out of the page."""
    folder = tmp_path_factory.mktemp("run")
    ci95 = {name: (value, value) for name, value in ACCURACY.items()}
    pictures = {
        "plots/accuracy.png": plot_accuracy(ACCURACY, ci95, num_prompts=9, sparsity=0.9),
        "plots/layer_sparsity.png": plot_layer_sparsity(PER_LAYER),
    }
    names = ("teacher", "dense", "pruned", "distilled", "student")
    samples = [
        Sample(
            prompt=attack,
            answer=attack * 9,
            completions=dict.fromkeys(names, attack * 9),
            correct=dict.fromkeys(names, False),
        )
        for attack in ATTACKS
    ]
    write_report(folder, full_report(), description(pictures=pictures, samples=samples))
    return folder / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Runs of different length, one of them with a name that tries to break out."""
    folder = tmp_path_factory.mktemp("runs")
    names = {"a": 0.5, "<img src=x onerror=y>": 0.7, "long_name_" * 8: 0.9}
    runs = [
        write_run(
            folder / name,
            CONFIG | {"prune": {"sparsity": sparsity}},
            logs=[{"step": step, "sparsity": sparsity, "kl": 1 / step} for step in range(1, last)],
        )
        for last, (name, sparsity) in enumerate(names.items(), start=5)
    ]
    assert main([*runs, "--html", str(folder / "compare.html")]) == 0
    return folder / "compare.html"


@pytest.fixture(params=["report", "comparison"])
def page(request):
    """Either page; both have two pictures."""
    return request.getfixturevalue(request.param)


def test_it_opens_without_a_word_on_the_console(page, tmp_path):
    dom, console = opened(page, tmp_path)
    assert console == []
    assert dom.count("<img") == 2
    assert "<script" not in dom


def test_a_page_that_complains_is_noticed(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('x'); y</script>")
    assert len(opened(bad, tmp_path / "profile")[1]) == 2


@pytest.mark.parametrize(
    ("flags", "inches", "paper"),
    [
        (("--window-size=1280,900",), 8, "rgb(255, 255, 255)"),
        (("--window-size=400,900", "--force-dark-mode"), 3.75, "rgb(22, 24, 27)"),
    ],
    ids=["wide by day", "narrow by night"],
)
def test_every_picture_is_there_and_nothing_sticks_out(page, tmp_path, flags, inches, paper):
    found = looked_at(page, tmp_path, *flags)
    assert found["paper"] == paper
    assert found["page"] <= found["width"]
    assert len(found["images"]) == 2
    for width, source in found["images"]:
        assert width == pytest.approx(96 * inches, abs=1)
        svg = base64.b64decode(source.partition(",")[2]).decode()
        assert ("fill=" in svg.partition(">")[0]) == (paper != "rgb(255, 255, 255)")
    assert max(found["tables"]) > found["width"] or inches == 8  # a wide table scrolls by itself
