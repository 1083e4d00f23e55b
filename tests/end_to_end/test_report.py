"""report.html and compare.html in a real browser: their figures are those of metrics.jsonl and predictions/."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import playwright.sync_api as playwright
import pytest

from tests.end_to_end.browser import opened
from tests.runs import ROOT, clean_environment, metrics, succeed, write_records, write_small_model
from train.commands.main import main
from train.pages.page import figure

pytestmark = pytest.mark.end_to_end

STEPS = 6


def words(folder: Path) -> list[str]:
    if not (folder / "model").exists():
        write_small_model(folder)
    return [
        *write_records(folder, train=40, held_out=10),
        *(f"model.random_from={folder / 'model'}", "tracker=none", "engine=none", "eval.max_new_tokens=4"),
        *(f"run.max_steps={STEPS}", "run.epochs=9", "run.packs_per_step=2", "data.max_tokens=256", "data.workers=1"),
        *("eval.every=3", "checkpoint.save_every=2", "run.threads=1"),
    ]


def killed_after(step: int, command: list[str], run: Path) -> None:
    """Start training, and kill it once that step is done."""
    process = subprocess.Popen(
        [sys.executable, "train/main.py", *command],
        cwd=ROOT,
        env=clean_environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    file = run / "metrics.jsonl"
    while not (file.exists() and f'{{"step": {step}, "loss"' in file.read_text()):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after four steps, looked at, and resumed."""
    folder = tmp_path_factory.mktemp("report")
    command, run = [*words(folder), f"run.dir={folder / 'run'}"], folder / "run"
    killed_after(4, command, run)
    assert 'data-state="running"' in (run / "report.html").read_text()  # written at the evaluation before
    main(["report", str(run)])
    shutil.copy(run / "report.html", run / "killed.html")
    shutil.copy(run / "metrics.jsonl", run / "killed.jsonl")
    succeed(command)
    return run


@pytest.fixture(scope="module")
def page(browser: "playwright.Browser", run: Path) -> Iterator["playwright.Page"]:
    with opened(browser, run / "report.html") as page:
        yield page


def places(page: "playwright.Page", chart: str) -> list[str]:
    """The words at each place of a chart."""
    return page.locator(f'[data-chart="{chart}"] title').evaluate_all("titles => titles.map(one => one.textContent)")


def expected(lines: list[dict[str, Any]], name: str, shown: str) -> list[str]:
    return [f"step {line['step']}: {shown} {figure(line[name])}" for line in lines if name in line]


def test_a_killed_run_has_a_page_of_the_steps_so_far(browser: "playwright.Browser", run: Path) -> None:
    lines = [json.loads(line) for line in (run / "killed.jsonl").read_text().splitlines()]
    with opened(browser, run / "killed.html") as page:
        assert page.locator("[data-state]").get_attribute("data-state") == "unfinished"
        assert f"after step 4 of {STEPS}; to resume, run the same command with run.dir={run}." in page.inner_text(
            "body"
        )
        assert places(page, "loss") == expected(lines, "loss", "all")


def test_a_resumed_run_has_one_unbroken_curve(page: "playwright.Page", run: Path) -> None:
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert places(page, "loss") == expected(lines, "loss", "all")
    assert places(page, "held-out loss") == expected(lines, "eval/loss", "all")
    assert places(page, "gradient norm") == expected(lines, "grad_norm", "before clipping")
    assert page.locator('[data-chart="loss"] path.curve').first.get_attribute("d").count("L") == STEPS - 1
    assert page.locator('[data-chart="loss"] .legend').get_attribute("data-last") == str(lines[-2]["loss"])


def test_the_figures_are_those_of_the_evaluations(page: "playwright.Page", run: Path) -> None:
    evaluations = [line for line in metrics(run) if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [0, 3, STEPS]
    shown = page.locator("#figures tr[data-figure]").evaluate_all(
        "rows => rows.map(row => [row.dataset.figure, ...[...row.cells].slice(1).map(cell => +cell.dataset.value)])"
    )
    names = sorted(name for name in evaluations[-1] if name.startswith("eval/"))
    assert [row[0] for row in shown] == [name.removeprefix("eval/") for name in names]
    for name, row in zip(names, shown, strict=True):
        assert row[1:] == [line[name] for line in evaluations]


def test_answers_stand_beside_their_references_with_what_was_seen_and_heard(page: "playwright.Page", run: Path) -> None:
    lines = [json.loads(line) for line in (run / f"predictions/step-{STEPS:06d}.jsonl").read_text().splitlines()]
    shown = page.locator(".answer").evaluate_all(
        """all => all.map(one => ({record: one.dataset.record, said: one.querySelector('.said').textContent,
            meant: one.querySelector('.meant').textContent, images: one.querySelectorAll('img').length,
            clips: one.querySelectorAll('audio').length, right: one.classList.contains('right')}))"""
    )
    by_record = {f"{line['file']}:{line['line']}": line for line in lines}
    assert sorted(one["record"] for one in shown) == sorted(by_record)
    for one in shown:
        line = by_record[one["record"]]
        assert (one["said"], one["meant"]) == (line["answer"], line["reference"])
        assert one["right"] == (line["answer"] == line["reference"])
        assert one["images"] == line["prompt"].count("<image>")
        assert one["clips"] == line["prompt"].count("<audio>")
    assert sum(one["clips"] for one in shown) > 0
    assert page.locator(".answer img").evaluate_all(
        """async images => { for (const one of images) { one.loading = "eager"; await one.decode(); }
            return images.length }"""
    ) == sum(one["images"] for one in shown)
    seconds = page.locator(".answer audio").first.evaluate(
        """audio => new Promise((done, fail) => { audio.onloadedmetadata = () => done(audio.duration);
            audio.onerror = () => fail(audio.error.message); audio.preload = 'metadata'; audio.load(); })"""
    )
    said = page.locator(".answer figure:has(audio) figcaption").first.text_content() or ""
    assert seconds == pytest.approx(float(re.findall(r", ([\d.]+) s", said)[0]), abs=0.15)


def test_answers_can_be_chosen(page: "playwright.Page") -> None:
    wrong = page.locator(".answer:not(.right)").count()
    page.check("#show-wrong")
    assert page.locator(".answer:visible").count() == wrong > 0
    page.check("#show-all")
    page.check("#type-0")
    assert page.locator(".answer:visible").count() == page.locator(".answer.type-0").count()


def test_options_environment_and_export_are_told(page: "playwright.Page", run: Path) -> None:
    text = page.inner_text("body")
    environment = json.loads((run / "environment.json").read_text())
    assert page.locator("[data-state]").get_attribute("data-state") == "finished"
    assert f"versions torch\t{environment['versions']['torch']}" in text
    assert f"run.max_steps\t{STEPS}\tnull" in text
    assert "its check passed" in text
    report = json.loads((run / "export" / "export.json").read_text())
    assert f"difference logits\t{report['difference']['logits']}" in text


@pytest.mark.parametrize("width", [390, 1100])
def test_nothing_overflows(width: int, browser: "playwright.Browser", run: Path) -> None:
    with opened(browser, run / "report.html", width) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_sweep_names_its_runs_goes_on_after_a_fault_and_ends_in_a_comparison(
    browser: "playwright.Browser", tmp_path: Path
) -> None:
    """The second of three runs is refused."""
    folder = tmp_path / "sweep"
    command = [sys.executable, "train/main.py", "-m", *words(tmp_path), f"run.dir={folder}", "+recipe=lora"]
    done = subprocess.run(
        [*command, "run.max_steps=1", "eval.every=0", "data.workers=0", "lora.rank=2,1000000,4"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"error: 1 of 3 runs failed: {folder / 'lora.rank-1000000'}" in done.stderr
    assert "Traceback" not in done.stderr
    names = ["lora.rank-2", "lora.rank-4"]
    for name, rank in zip(names, (2, 4), strict=True):
        assert json.loads((folder / name / "export" / "adapter" / "adapter_config.json").read_text())["r"] == rank
    assert "over 10 held-out records" in done.stdout
    with opened(browser, folder / "compare.html", 390) as page:
        for place, name in enumerate(names):
            loss = page.locator(f'tr[data-figure="loss"] td >> nth={place + 1}').get_attribute("data-value")
            assert float(loss or "nan") == metrics(folder / name)[-1]["eval/loss"]
        assert page.locator("#options tr").all_inner_texts()[1:] == ["lora.rank\t2\t4"]
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
