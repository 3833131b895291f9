"""`golf report`: what is on the page is what is in the records, and it works in a real browser without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench.lab import write_run
from paramgolf.errors import GolfError
from paramgolf.lab.report import write_report
from paramgolf.lab.report_data import CURVE_POINTS, collect, curve
from paramgolf.lab.svg import Chart, label, log_ticks, ticks, without_outliers
from tests.run_common import error_line, golf_here
from tests.test_lab_sweep import standin_sweep

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    for i in range(20):
        write_run(root / "runs" / f"pocket-{i}", i, lines=100, artifact_bytes=500)
    return root / "runs"


class Page(HTMLParser):
    """The rows of the first table, and every address the page mentions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.heads: list[str] = []
        self.links: list[str] = []
        self._cell: list[str] | None = None
        self._tables = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tables += tag == "table"
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "tr" and self._tables == 1:
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None and self._tables == 1:
            (self.heads if tag == "th" else self.rows[-1]).append("".join(self._cell))
            self._cell = None

    @property
    def body(self) -> list[list[str]]:
        return [row for row in self.rows if row]


def test_the_page_shows_the_records(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    facts = write_report([str(runs)], out)
    text = out.read_text()
    page = Page(text)
    assert facts["runs"] == 20 and len(page.body) == 20
    best = min(json.loads(p.read_text())["val_bpb_sliding"] for p in runs.glob("*/record.json"))
    assert page.body[0][page.heads.index("BPB")] == f"{best:.4f}"
    assert all(link.startswith("#") for link in page.links)
    assert "http" not in re.sub(r"<code>.*?</code>", "", text)
    assert text.count('class="curve"') == 3 * 20 + 1  # three axes, and the frontier
    assert text.count("sealed</td>") == 20
    assert "pocket, mlp_hidden=432: mean" in text  # recipes of one name are told apart
    again = tmp_path / "again.html"
    write_report([str(runs)], again)
    assert again.read_bytes() == out.read_bytes()


def test_changed_files_stand_out_and_hostile_names_stay_text(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    (copy / "pocket-3" / "train.jsonl").write_text('{"step": 1, "tokens": 1, "elapsed": 1, "loss": 3}\n{"st')
    (copy / "pocket-4" / "model.golf").unlink()
    (copy / "pocket-5" / "record.json").write_text("{")
    (copy / "pocket-6").rename(copy / "<script>alert(1)")
    record = json.loads((copy / "pocket-7" / "record.json").read_text())
    (copy / "pocket-7" / "record.json").write_text(json.dumps(record | {"recipe": "<img src=x>"}))
    facts = write_report([str(copy)], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert facts["runs"] == 19 and len(facts["left_out"]) == 1
    assert "train.jsonl was changed" in text and "model.golf is missing" in text and "the record was changed" in text
    assert "<script>alert" not in text and "<img" not in text


def test_one_run_and_no_run(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = golf_here(capfd, "report", runs / "pocket-1", "-o", tmp_path / "one.html", "--json")
    assert json.loads(answer.out)["runs"] == 1 and (tmp_path / "one.html").is_file()
    assert "no finished run" in error_line(golf_here(capfd, "report", tmp_path / "x*", "-o", tmp_path / "no.html"))
    assert not (tmp_path / "no.html").exists()


def test_a_sweep_is_on_the_page(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    words = ["optim.matrix_lr=0.005..0.08:log", "model.skips=unet,none"]
    standin_sweep(tmp_path / "s", *words, trials=8, workers=2, seed=3)
    write_report([str(tmp_path / "s")], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Sweep standin-sweep" in text and "score along optim.matrix_lr" in text
    assert "0 = none, 1 = unet" in text and "importance of the settings" in text
    (tmp_path / "s" / "study.journal").unlink()
    with pytest.raises(GolfError, match="is gone"):
        write_report([str(tmp_path / "s")], tmp_path / "r2.html")


def test_curves_are_thinned_to_their_means(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 1, lines=1000, artifact_bytes=10)
    thin = curve(tmp_path / "run" / "train.jsonl")
    assert CURVE_POINTS / 2 < len(thin) <= CURVE_POINTS
    rows = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    last = sum(row["loss"] for row in rows[-10:]) / 10
    assert thin[-1][3] == pytest.approx(last, abs=0.1)
    assert curve(tmp_path / "nothing") == []


def test_one_wild_run_does_not_flatten_the_rest() -> None:
    values = [2.0, 2.01, 2.02, 2.03, 9.0]
    assert without_outliers(values) == values[:4] and without_outliers([1.0, 9.0]) == [1.0, 9.0]
    chart = Chart((0.0, 1.0), (2.0, 2.03), "x", "y")
    chart.point(0.5, 9.0, "#000")
    assert 'fill="none"' in chart.render("edge")


def test_a_log_of_tiny_times_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0, lines=5, artifact_bytes=500)
    log = tmp_path / "run" / "train.jsonl"
    rows = [json.loads(line) | {"elapsed": 5e-324} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(tmp_path / "run" / "record.json", (15_000_000_000, 15_000_000_000))  # and of a time far from now
    assert write_report([str(tmp_path / "run")], tmp_path / "report.html")["runs"] == 1


def test_ticks_are_round() -> None:
    assert ticks(0.0, 5e-324) == [0.0] and ticks(0.0, 5e-320) == [0.0]
    assert len(ticks(0.0, 1e-299)) > 3
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(2.013, 2.031, 4) == pytest.approx([2.015, 2.02, 2.025, 2.03])
    assert [label(v, 0.005) for v in (2.015, 2.02)] == ["2.015", "2.020"]
    assert [label(v) for v in (1.5e6, 20_000, 300)] == ["1.5M", "20k", "300"]
    assert log_ticks(0.009, 0.05) == pytest.approx([0.01, 0.02, 0.05])
    assert "nan" not in Chart((1.0, 1.0), (2.0, 2.0), "x", "y").render("flat")


# -- in a browser --------------------------------------------------------------------------------------------------

CLICKS = """
<script>
window.addEventListener("load", function () {
  var heads = document.querySelectorAll("table.sortable th button"), out = {};
  var column = function (i) {
    return Array.prototype.map.call(document.querySelectorAll("table.sortable tbody tr"),
      function (row) { return row.cells[i].dataset.v; });
  };
  heads.forEach(function (head, i) { head.click(); out[head.textContent] = [column(i)]; });
  heads.forEach(function (head, i) { head.click(); head.click(); out[head.textContent].push(column(i)); });
  var shown = [];
  document.querySelectorAll(".tabs > label").forEach(function (tab) {
    tab.click();
    shown.push(Array.prototype.filter.call(document.querySelectorAll(".pane"),
      function (pane) { return getComputedStyle(pane).display !== "none"; }).map(function (p) { return p.id; }));
  });
  document.body.innerHTML = "<pre>" + JSON.stringify({columns: out, panes: shown, wide: document.title}) + "</pre>";
});
</script>
"""


def in_browser(page: Path) -> tuple[str, str]:
    """(DOM after its scripts ran, what the browser said)."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", f"file://{page}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if not done.stdout:
        pytest.skip(f"Chromium does not run here: {done.stderr[-200:]}")
    return done.stdout, done.stderr


def test_in_a_browser(runs: Path, tmp_path: Path) -> None:
    write_report([str(runs)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    clicking = tmp_path / "clicks.html"
    clicking.write_text(text.replace("</body>", CLICKS + "</body>"))
    dom, said = in_browser(clicking)
    assert "CONSOLE" not in said, said  # no error, no warning
    found: dict[str, Any] = json.loads(re.search(r"<pre>(.*)</pre>", dom, re.DOTALL)[1])  # type: ignore[index]
    assert found["panes"] == [["pane-1"], ["pane-2"], ["pane-3"]]
    for name, (up, down) in found["columns"].items():
        numbers = all(re.fullmatch(r"-?[\d.]+(e-?\d+)?", v) for v in up if v)
        ordered = sorted(float(v) for v in up) if numbers else None
        if ordered is not None:
            assert [float(v) for v in up] == ordered, name
            assert [float(v) for v in down] == ordered[::-1], name
    assert set(found["columns"]["seed"][0]) == {"0", "1", "2"}


def test_it_prints(runs: Path, tmp_path: Path) -> None:
    write_report([str(runs)], tmp_path / "report.html")
    in_browser(tmp_path / "report.html")  # skips where there is none
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    pdf = tmp_path / "report.pdf"
    command = [str(browser), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               f"--print-to-pdf={pdf}", f"file://{tmp_path / 'report.html'}"]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    assert 2 <= pages <= 12


def test_collect_names_runs_apart(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "pocket-1", tmp_path / "other" / "pocket-1")
    found, _, _ = collect([str(runs / "pocket-1"), str(tmp_path / "other")])
    assert len({run.name for run in found}) == 2
