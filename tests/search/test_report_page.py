# SPDX-License-Identifier: Apache-2.0
"""The HTML report: what stands in it, and what a real browser makes of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ic_conv import DilationPattern, LayerPattern
from search.report import Comparison
from search.report.page import duration, record_path, remake_reports, report_path, write_report
from search.report.record import RunRecord

ROOT = Path(__file__).parents[2]


def found(kernel: int = 9, blocks: int = 3) -> DilationPattern:
    """A pattern with everything that a search leaves in its meta."""
    rng = np.random.default_rng(0)
    side = range(1, (kernel - 1) // 2 + 1)
    candidates = [(dy, dx) for dy in side for dx in side]
    names = [f"layer{stage}.{block}.conv2" for stage in (1, 2) for block in range(blocks)]
    layers = tuple(
        LayerPattern.from_assignment([candidates[i] for i in rng.integers(len(candidates), size=64)], name)
        for name in names
    )
    meta = {
        "architecture": "my.nets:<b>wide</b>_network_with_a_very_long_name_that_a_phone_must_break",
        "strategy": "edo",
        "criterion": "energy",
        "data": "scattered digits",
        "seed": 0,
        "layer_stride": dict.fromkeys(names, (4.0, 4.0)),
        "layer_error": dict.fromkeys(names, 0.3),
        "candidate_error": {name: rng.uniform(0.4, 0.9, len(candidates)).round(4).tolist() for name in names},
        "criteria_error": {"taps": dict.fromkeys(names, 0.4375)},
        "training": {"steps": 50, "batch_size": 8},
        "versions": {"torch": "2.11.0"},
        "supernet_sha256": "0" * 64,
    }
    return DilationPattern(layers, kernel, meta=meta)


def full_record() -> RunRecord:
    field = {"extent": [40.0, 30.0], "map": [[1000 * (i == j) for j in range(24)] for i in range(16)]}
    return RunRecord(
        command="python tools/search.py " + "--data 'a folder' " * 20,
        seconds=3725,
        device="cpu, 2 threads",
        curve={"step": list(range(50)), "loss": [5 / (1 + i) for i in range(50)], "lr": [0.1] * 50},
        fields={f"layer{stage}.2.conv2": {"plain": field, "found": field} for stage in (1, 2)},
        field_images=(16, 64, 96),
    )


PAGES = {
    "full": (found(), full_record()),
    "many layers": (found(13, 23), full_record()),
    "pattern alone": (DilationPattern((LayerPattern.plain(8),), 9), RunRecord()),
}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7805, "2 h 10 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_page_holds_every_part_and_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    write_report(*PAGES["full"], path, "it's/p.json")
    page = path.read_text(encoding="utf-8")
    assert len(page) < 500_000
    assert page.count('<svg class="heat blue"') == page.count('<svg class="heat orange"') == 6
    assert page.count("data:image/svg+xml") == 5 and page.count("data:image/png") == 4
    for part in ("1 h 2 min", "50 steps of 8 images", "cpu, 2 threads", "random", "uniform", "hand"):
        assert part in page
    assert "--data &#39;a folder&#39;" in page and "<b>wide" not in page and "&lt;b&gt;wide" in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert not re.search(r"<script|<link|\sid=\"(\w+)\".*\sid=\"\1\"", page, re.DOTALL)


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    write_report(*PAGES["pattern alone"], path)
    page = path.read_text(encoding="utf-8")
    assert "nothing to compare" in page and "No log of a training" in page
    assert "Effective" not in page and "Run it again" not in page and "None" not in page and "nan" not in page


def test_pages_are_made_again_from_a_folder_and_from_a_file(tmp_path: Path) -> None:
    for name in ("a_k9", "b_k9"):
        found().save(tmp_path / f"{name}.json")
    full_record().save(record_path(tmp_path / "a_k9.json"))
    assert remake_reports(tmp_path) == [tmp_path / "a_k9.html", tmp_path / "b_k9.html"]
    assert (
        "1 h 2 min" in (tmp_path / "a_k9.html").read_text()
        and "1 h 2 min" not in (tmp_path / "b_k9.html").read_text()
    )
    before = (tmp_path / "a_k9.html").read_bytes()
    report_path(tmp_path / "a_k9.json").unlink()
    assert remake_reports(tmp_path / "a_k9.json") == [tmp_path / "a_k9.html"]
    assert (tmp_path / "a_k9.html").read_bytes() == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty must hold a search's result"):
        remake_reports(tmp_path / "empty")


def run(folder: Path, tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_search_leaves_its_report(tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def tiny():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))\n"
    )
    done = run(
        tmp_path,
        "search.py",
        "--arch",
        "mynet:tiny",
        "--steps",
        4,
        "--calibration-images",
        8,
        "--work-dir",
        "w",
    )
    assert done.returncode == 0, done.stderr
    assert "report   w/tiny_k9.html\n" in done.stdout
    record = RunRecord.load(tmp_path / "w/tiny_k9.report.json")
    assert record.curve["step"] == [1, 2, 3, 4] and min(record.curve["loss"]) > 0 and record.trained
    assert record.command and record.command.endswith("--calibration-images 8 --work-dir w")
    assert list(record.field_images) == [8, 96, 96] and list(record.fields) == ["2"]
    assert record.fields["2"]["plain"]["extent"] != record.fields["2"]["found"]["extent"]
    page = (tmp_path / "w/tiny_k9.html").read_text(encoding="utf-8")
    assert "4 steps of 8 images" in page and "found, shuffled" in page and record.command in page
    (tmp_path / "w/tiny_k9.html").unlink()
    again = run(tmp_path, "visualize.py", "report", "w")
    assert again.stdout == "w/tiny_k9.html\n" and (tmp_path / "w/tiny_k9.html").read_text() == page
    bad = run(tmp_path, "visualize.py", "report", "nowhere")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "nowhere" in bad.stderr


TABLE = "| method | mAP |\n|---|---|\n| plain x2 steps | 90.0 ± 0.5 |\n| edo <energy> | 84.2 ± 1.4 |\n"


def test_more_patterns_and_a_table_of_scores(tmp_path: Path) -> None:
    path, other, table = tmp_path / "p.json", tmp_path / "gradient.json", tmp_path / "scores.md"
    found().save(path)
    names = [str(name) for name in found().names]
    DilationPattern(tuple(LayerPattern.plain(64, name) for name in names), 5).save(other)
    table.write_text(TABLE)
    more = Comparison.read([str(other)], str(table))
    (page,) = (made.read_text(encoding="utf-8") for made in remake_reports(path, more))
    rows = dict(re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td>', page))
    assert rows["gradient"] == rows["plain"] and rows["criterion taps"] == "0.4375"  # plain in both
    assert "84.2 ± 1.4" in page and "edo &lt;energy&gt;" in page
    assert f"report {path} --patterns {other} --table {table}" in page


@pytest.mark.parametrize(
    ("pattern", "table", "message"),
    [
        (LayerPattern.plain(64, "x"), TABLE, "other does not suit the layers of this search: "),
        (LayerPattern.plain(64), TABLE, "other does not suit .* the pattern has 1 layers"),
        (None, "no table", r"scores.md must hold one table, as `tools/compare.py --output` writes it"),
        (None, "| a | b |\n|---|---|\n| c |\n", "must hold one table"),
    ],
)
def test_what_cannot_be_compared(
    pattern: LayerPattern | None, table: str, message: str, tmp_path: Path
) -> None:
    path, other, scores = tmp_path / "p.json", tmp_path / "other.json", tmp_path / "scores.md"
    found().save(path)
    DilationPattern((pattern,) if pattern else found().layers, 9).save(other)
    scores.write_text(table)
    with pytest.raises(ValueError, match=message):
        remake_reports(path, Comparison.read([str(other)], str(scores)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=path, args=["--no-sandbox"] * (os.geteuid() == 0)
            )
        except api.Error as error:
            pytest.skip(f"no Chromium to open the page with: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


SIZES = """() => [...document.querySelectorAll('img, svg, figure, .scroll')].map(part => {
    const box = part.getBoundingClientRect();
    return {tag: part.tagName, width: box.width, height: box.height, right: box.right,
            loaded: part.tagName != 'IMG' || (part.complete && part.naturalWidth > 0),
            words: part.alt || part.ariaLabel || part.innerText};
})"""


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (375, "light"), (375, "dark")])
def test_a_browser_shows_it(name: str, width: int, scheme: str, browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    write_report(*PAGES[name], path)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    page.evaluate("document.querySelector('details').open = true")
    parts = page.evaluate(SIZES)
    assert said == []
    assert {part["tag"] for part in parts} == {"IMG", "svg", "FIGURE", "DIV"}
    for part in parts:
        assert part["width"] > 40 and part["height"] > 20 and part["loaded"] and part["words"], part
        assert part["right"] <= width, part
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    assert dark == (scheme == "dark")
    page.close()
