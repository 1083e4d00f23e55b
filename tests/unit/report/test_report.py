"""report.html of folders written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.unit.report.builders import evaluation, step, write_run
from train.commands.main import main
from train.commands.options import read_options
from train.data.record_set import SourceSpec
from train.data.workers import UNWATCHED
from train.report.media import Bounds, read_media
from train.report.report import write_report

HOSTILE = """</style><script>alert(1)</script><img src=x onerror=alert(1)>"""


def write_media(folder: Path, count: int) -> SourceSpec:
    """Records of an image and a clip each."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)).save(folder / "noise.png")
    soundfile.write(folder / "long.wav", np.sin(np.arange(16_000 * 20) / 9), 16_000)
    turns = [
        {"role": "user", "content": {"text": "?", "image": "noise.png", "audio": "long.wav"}},
        {"role": "assistant", "content": "a"},
    ]
    lines = [json.dumps({"conversations": turns})] * count
    (folder / "held.jsonl").write_text("\n".join(lines))
    return SourceSpec("held", str(folder / "held.jsonl"), str(folder))


def test_media_are_small_and_a_clip_is_cut(tmp_path: Path) -> None:
    spec = write_media(tmp_path, 2)
    found = read_media({"held.jsonl": spec}, [("held.jsonl", 2), ("held.jsonl", 9)], {}, Bounds(), UNWATCHED)
    [(place, [image, clip])] = found.items()
    assert place == ("held.jsonl", 2)
    assert image.uri.startswith("data:image/jpeg;base64,")
    assert image.note == "noise.png, 400×300"
    assert clip.uri.startswith("data:audio/mpeg;base64,")
    assert clip.note == "long.wav, its first 12 s"
    assert len(clip.uri) < 60_000


def test_media_keep_to_the_bounds_and_are_not_read_twice(tmp_path: Path) -> None:
    spec = write_media(tmp_path, 3)
    specs, places = {"held.jsonl": spec}, [("held.jsonl", line) for line in (1, 2, 3)]
    [one] = read_media(specs, places[:1], {}, Bounds(), UNWATCHED).values()
    size = sum(len(medium.uri) for medium in one)
    assert len(read_media(specs, places, {}, Bounds(characters=2 * size), UNWATCHED)) == 2
    assert len(read_media(specs, places, {}, Bounds(seconds=0), UNWATCHED)) == 1
    known = dict.fromkeys(places, one)
    (tmp_path / "held.jsonl").unlink()
    assert read_media(specs, places, known, Bounds(seconds=0), UNWATCHED) == known


def test_a_file_of_records_that_is_gone_leaves_the_page_without_media(tmp_path: Path) -> None:
    words = ["data.eval=[{path: held.jsonl}]", "data.workers=0"]
    run = write_run(tmp_path / "run", [step(1, 2), evaluation(1, 1)], {1: [("a", "b")]}, words, total_steps=1)
    file = run / "predictions" / "step-000001.jsonl"
    file.write_text(file.read_text().replace("1?", "<image>1?"))
    assert write_report(run, read_options(run / "config.yaml")).media == {}
    assert "user: &lt;image&gt;1?" in (run / "report.html").read_text()


def test_what_stands_in_records_is_escaped(tmp_path: Path) -> None:
    lines = [step(1, 2, **{f"loss/{HOSTILE}": 1.0, "loss/other": 1.0}), evaluation(1, 1, **{f"f1/{HOSTILE}": 0.5})]
    run = write_run(tmp_path / "run", lines, {1: [("a", HOSTILE), (HOSTILE, "a")]}, total_steps=1)
    file = run / "predictions" / "step-000001.jsonl"
    rows = [json.loads(line) | {"type": HOSTILE, "prompt": HOSTILE} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, rows)))
    note = {"source": HOSTILE, "line": 1, "reason": HOSTILE}
    (run / "quarantine.jsonl").write_text(json.dumps(note))
    (run / "certificate.json").write_text(json.dumps({"lines": [{"name": HOSTILE, "why": HOSTILE, "figure": None}]}))
    main(["report", str(run)])
    page = (run / "report.html").read_text()
    assert page.count("&lt;script&gt;") > 8
    assert "<script" not in page
    assert "onerror=alert(1)>" not in page


def test_a_run_whose_options_cannot_be_read_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [step(1, 2)], {1: [("a", "b")]})
    (run / "config.yaml").write_text("run: {max_stepz: 1}")
    main(["report", str(run)])
    assert "without options and media: " in capsys.readouterr().err
    assert "cannot be read by this version" in (run / "report.html").read_text()


def test_a_folder_without_anything_but_options_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    main(["report", str(run)])
    assert "The run was killed or stopped after step 0" in (run / "report.html").read_text()


def test_a_page_may_stand_elsewhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    main(["report", str(run), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").is_file()
    assert not (run / "report.html").exists()
    with pytest.raises(SystemExit, match=r"page.html' cannot be written .*; name another file"):
        main(["report", str(run), "--out", str(tmp_path / "none" / "page.html")])


@pytest.mark.parametrize("letter", ["x", "样", "<"])
def test_a_page_of_long_answers_is_bounded(letter: str, tmp_path: Path) -> None:
    pairs = [(letter * 5000, f"{n}{letter * 5000}") for n in range(3000)]
    run = write_run(tmp_path / "run", [step(1, 2), evaluation(1, 1)], {1: pairs}, total_steps=1)
    write_report(run, None)
    page = (run / "report.html").read_bytes()
    assert len(page) < 7_000_000
    assert b"(5000 characters)" in page
