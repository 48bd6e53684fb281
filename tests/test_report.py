"""The page about a run: complete in itself, true to the log, and honest about what it had to leave out."""

import base64
import io
import json
import shlex
import shutil
import subprocess
from contextlib import redirect_stdout
from html.parser import HTMLParser
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fastdino.cli import main

SMALL = shlex.split(
    "--arch vit_nano --patch_size 8 --global_crops_size 32 --local_crops_size 16 --out_dim 64 --hidden_dim 32 "
    "--bottleneck_dim 16 --epochs 1 --batch_size_per_gpu 8 --attention_images 0 --num_workers 0"
)
SHOWN = 3  # rows of a page, which take longest


@pytest.fixture(scope="module")
def run(tmp_path_factory, photo_folder):
    """A run over photographs of four classes, one of which cannot be read any more."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(photo_folder, folder / "<photos>")
    words = ["--data_path", folder / "<photos>", "--output_dir", folder / "run"]
    assert main(["train", *map(str, words), *SMALL]) == 0
    sorted((folder / "<photos>").rglob("*.jpg"))[4].write_bytes(b"broken")
    return folder / "run"


class Page(HTMLParser):
    """What a browser would load, and the text it would show."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.cells, self.words, self.tags = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag == "figure":
            self.cells.append(dict(attrs).get("class", ""))

    def handle_data(self, data):
        self.words.append(data.strip())


def report(run, *flags):
    with mock.patch("fastdino.report.SHOWN", SHOWN):
        assert main(["report", str(run), *flags]) == 0
    return Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(run):
    """(the page, what the command said)."""
    (run / "evaluations.jsonl").write_text('{"evaluation": "knn", "weights": "w", "data": "d", "20nn_top1": 0.5}\nno\n')
    with redirect_stdout(io.StringIO()) as said:
        return report(run), said.getvalue()


def opened(uri):
    kind, _, data = uri.partition(";base64,")
    content = base64.b64decode(data)
    if kind == "data:image/svg+xml":
        return ElementTree.fromstring(content)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_the_page_needs_nothing_else_and_tells_what_the_run_told(run, page):
    page, said = page
    assert all(source.startswith("data:image/") for source in page.sources)
    assert page.tags.isdisjoint({"script", "link", "iframe"})
    pictures = [opened(source) for source in page.sources]
    assert len(pictures) == 3 + SHOWN * 8  # curves, attention, components; rows of neighbours
    assert all(p.std() > 1 for p in pictures if isinstance(p, np.ndarray))
    text = "\n".join(page.words)
    knn = json.loads((run / "log.txt").read_text())["knn"]
    for expected in (
        f"{knn:.4f}\ntraining, epoch 1",
        "knn: 20nn_top1\n0.5000\nw, d (evaluations.jsonl)",
        "--out_dim\n64\n65536",
        "31 images, leave-one-out",
        "Without 1 unreadable images: ",
        "<photos>",
        "vit_nano/8",
    ):
        assert expected in text, expected
    assert "looked at 31 of 32 images" in said


def test_a_frame_marks_the_class_of_the_query(page):
    kinds = [kind for kind in page[0].cells if kind in ("query", "same", "other")]
    rows = [kinds[i : i + 8] for i in range(0, 8 * SHOWN, 8)]
    assert [row[0] for row in rows] == ["query"] * SHOWN
    assert {kind for row in rows for kind in row[1:]} == {"same", "other"}


def test_a_run_whose_images_are_gone_is_still_told_of(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    args = json.loads((tmp_path / "run/args.json").read_text())
    (tmp_path / "run/args.json").write_text(json.dumps(args | {"data_path": "nowhere"}))
    page = report(tmp_path / "run")
    assert any("No pictures of images: expected a folder" in words for words in page.words)
    assert len(page.sources) == 1
    assert "nothing at nowhere" in capsys.readouterr().out
    found = report(tmp_path / "run", "--data_path", str(run.parent / "<photos>"), "--images", "9")
    assert len(found.sources) == 3 + SHOWN * 8


def test_a_browser_shows_it(run, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    report(run)
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,3000", f"--screenshot={picture}"]
    done = subprocess.run([browser, *flags, f"file://{run / 'report.html'}"], capture_output=True, timeout=120)
    assert picture.is_file(), done.stderr[-1000:]
    shown = np.asarray(Image.open(picture).convert("RGB"))
    n_full = sum(band.std() > 5 for band in np.array_split(shown, 20))
    assert n_full >= 15  # of twenty bands, most hold something


MISTAKES = {
    "no run": (["nowhere"], "no run in nowhere: there is no such folder"),
    "no arguments": (["."], "no run in .: there is no args.json"),
    "not arguments": (["odd"], "odd/args.json holds no arguments of a run"),
    "output": (["odd", "--output", "nowhere/a.html"], "--output: expected a file in a folder that exists"),
    "images": (["odd", "--images", "0"], "--images: expected a value above 0, got 0"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/args.json").write_text('{"epochs": "many"}')
    assert main(["report", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
