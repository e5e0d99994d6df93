"""Reports, the table of runs and pictures of views, of a real tiny run, opened in a real browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image

from launcher.cli import main as cli
from launcher.report.build import families
from launcher.report.chart import thinned, ticks
from launcher.report.timeline import attempt_spans
from launcher.runs.goodput import goodput
from launcher.runs.records import Ending, Records
from mokd.runs.run_directory import RunDirectory
from tests.support import mokd, tiny


@pytest.fixture(scope="module")
def root(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained tiny run, and on its record a restart from step 3 after step 5."""
    root = tmp_path_factory.mktemp("reports")
    test = beton.with_name("test.beton")
    evaluation = {"train": str(beton), "test": str(test), "resize_px": 36, "crop_px": 32, "every_epochs": 1}
    changes = {"optim__epochs": 1, "optim__warmup_epochs": 0, "evaluation": evaluation}
    (root / "tiny.yaml").write_text(yaml.safe_dump(tiny(beton, **changes)))
    trained = mokd("train", root / "tiny.yaml", "--root", root / "runs")
    assert trained.returncode == 0, trained.stderr
    run = RunDirectory.open(root / "runs" / "tiny")
    evaluated = mokd("eval", run.path)
    assert evaluated.returncode == 0, evaluated.stderr
    facts = Records(run).attempt_facts(1)
    last = float(run.read_status()["time"])
    times = {"started": facts["time"], "ended": last}
    reason = "rank 1 <killed> & gone"
    Records(run).write_ending(Ending(1, 1, "requeued", "failure", reason, 3, first_step=0, last_step=5, **times))
    run.claim_attempt({"launch": 1, "time": last + 5.0, "step": 3})
    run.write_status("done", 2, step=5)
    alarm = {"time": last, "step": 4, "alarm": "uniform teacher", "advice": "lower optim.<b>temperature</b>"}
    (run.path / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    change = {"time": last, "step": 3, "key": "optim.momentum", "before": 0.9, "after": 0.95}
    run.changes_file.write_text(json.dumps(change) + "\n")
    return root


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    """The report's text."""
    cli.app(["views", str(root / "runs" / "tiny"), "--images", "2"], standalone_mode=False)
    cli.app(["report", str(root / "runs" / "tiny")], standalone_mode=False)
    return (root / "runs" / "tiny" / "report.html").read_text()


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_what_a_report_holds(page: str) -> None:
    for text in ("Goodput:", "resnet10t", "rank 1 &lt;killed&gt; &amp; gone", "uniform teacher", "optim.momentum"):
        assert text in page
    for title in (
        "Loss of resnet",
        "Loss of vit",
        "Images per second",
        "Evaluations",
        "Environment",
        "global_batch: 8",
    ):
        assert title in page
    assert "<b>temperature" not in page


def test_nothing_comes_from_elsewhere_and_everything_is_told_in_words(page: str) -> None:
    elements = Elements(page).found
    assert not {tag for tag, _ in elements} & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, attributes in elements:
        for name in ("src", "href", "xlink:href", "srcset"):
            assert re.match(r"#|data:image/png", attributes.get(name) or "#"), (tag, attributes)
        if tag == "img":
            assert attributes["alt"]
        if attributes.get("role") in ("img", "region"):
            assert attributes["aria-label"]
    assert not re.search(r"url\(|@import", page)
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [360, 390, 1280, 1440])
def test_it_fits_the_screen_in_a_browser(page: str, width: int, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page)
    # a window has a smallest width, a frame has not; its script can look into the page, which itself allows none
    probe = """<body><iframe id="f" src="report.html" style="width:%dpx;height:900px;border:0"></iframe><script>
      document.getElementById("f").onload = e => { const d = e.target.contentDocument, out = {};
        out.wide = d.documentElement.scrollWidth;
        out.figures = [...d.querySelectorAll("figure svg[role], figure img, .bar")].map(x => x.getBoundingClientRect())
          .map(r => [r.left, r.right, r.height]);
        out.headings = [...d.querySelectorAll("thead th")].map(x => x.getBoundingClientRect().height);
        out.images = [...d.images].map(i => i.naturalWidth);
        const p = document.createElement("pre"); p.id = "out"; p.textContent = JSON.stringify(out);
        document.body.append(p); }</script>"""
    (tmp_path / "probe.html").write_text(probe % width)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    ]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    seen = subprocess.run(
        ["chromium", *options, (tmp_path / "probe.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in seen.stderr, seen.stderr
    found = re.search(r'<pre id="out">(.*?)</pre>', seen.stdout, re.DOTALL)
    assert found is not None, seen.stdout[-500:]
    out = json.loads(found[1])
    assert out["wide"] <= width
    assert max(out["headings"]) < 45  # on one line, not letter by letter
    assert len(out["figures"]) > 8
    assert all(left >= 0 and right <= width and height > 20 for left, right, height in out["figures"])
    assert all(natural > 0 for natural in out["images"])
    assert out["images"]


def test_the_spans_of_a_real_run(root: Path) -> None:
    run = RunDirectory.open(root / "runs" / "tiny")
    first, second = goodput(run).attempts
    spans = attempt_spans(run, first)
    assert spans[0].phase == "start"
    assert all(before.ended == after.started for before, after in pairwise(spans))
    assert first.steps_lost == 2
    waited = attempt_spans(run, second)[0]
    assert (waited.phase, round(waited.ended - waited.started)) == ("queued", 5)


def test_steps_done_again_are_lost_in_the_timeline(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim_attempt({"launch": 1, "time": 100.0, "step": 0})
    moments = [(101.0, "start", 0), (110.0, "step", 1), (116.0, "save", 3), (117.0, "step", 3)]
    run.phases_file(1).parent.mkdir()
    lines = [json.dumps(dict(zip(("time", "phase", "step"), moment, strict=True))) for moment in moments]
    run.phases_file(1).write_text("\n".join(lines))
    times = {"started": 100.0, "ended": 121.0}
    Records(run).write_ending(Ending(1, 1, "requeued", "failure", "", 3, first_step=0, last_step=5, **times))
    (attempt,) = goodput(run).attempts
    spans = [(span.phase, span.ended - span.started) for span in attempt_spans(run, attempt)]
    assert spans == [("start", 1.0), ("start", 9.0), ("step", 6.0), ("save", 1.0), ("lost", 4.0)]


def test_the_table_of_runs(root: Path, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    arguments = [str(root / "runs"), "--sort", "knn", "--html", str(root / "index.html"), "--json"]
    cli.app(["runs", *arguments], standalone_mode=False)
    (line,) = json.loads(capsys.readouterr().out)["runs"]
    assert (line["state"], line["step"], line["restarts"]) == ("done", 5, 1)
    assert set(line["best_knn"]) == {"resnet", "vit"}
    assert 'href="runs/tiny/report.html"' in (root / "index.html").read_text()
    cli.app(["runs", str(root / "runs"), "--state", "failed", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["runs"] == []


def test_views_before_any_training(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    out = root / "views.png"
    cli.app(["views", str(root / "tiny.yaml"), "--images", "3", "--out", str(out), "--json"], standalone_mode=False)
    facts = json.loads(capsys.readouterr().out)["samples"]
    assert [len(sample["views"]) for sample in facts] == [5, 5, 5]
    for sample in facts:
        for view in sample["views"]:
            x, y, width, height = view["box"]
            assert 0 <= x < x + width <= sample["width"]
            assert 0 <= y < y + height <= sample["height"]
    with Image.open(out) as picture:
        assert picture.width > 320
        assert len(picture.getcolors(1 << 24) or []) > 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "{root}/nothing"], "not a run directory"),
        (["report", "{root}/runs/tiny", "--out", "{root}/tiny.yaml/x.html"], "cannot be written"),
        (["runs", "{root}/nothing"], "no such folder"),
        (["runs", "{root}/runs", "--sort", "beauty"], "expected one of"),
        (["views", "{root}/nothing.yaml"], "no such configuration"),
        (["views", "{root}/tiny.yaml", "data.train=none.beton"], "no such file"),
    ],
)
def test_a_mistake_is_one_line(root: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main([argument.format(root=root) for argument in arguments])
    out, err = capsys.readouterr()
    assert (end.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err


def test_curves() -> None:
    records = [{"step": 1, "loss/a/total": 2.0, "lr/a": 0.1}, {"step": 2, "loss/a/total": None, "speed": 3.0}]
    assert families(records) == {
        "Loss of a": {"total": [(1, 2.0), (2, None)]},
        "lr": {"a": [(1, 0.1)]},
        "speed": {"speed": [(2, 3.0)]},
    }
    peaked = [(float(x), 100.0 if x == 777 else float(x % 7)) for x in range(5000)]
    kept = thinned(peaked)
    assert len(kept) <= 360
    assert (777.0, 100.0) in kept
    assert ticks(0.0, 9.7, 4) == [0.0, 2.5, 5.0, 7.5, 10.0]
    assert ticks(3.0, 3.0, 4)[0] < 3.0 < ticks(3.0, 3.0, 4)[-1]
