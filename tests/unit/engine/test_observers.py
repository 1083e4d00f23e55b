"""metrics.jsonl."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT
from train.engine.evaluator import Evaluation
from train.engine.observers import MetricsFile, StepReport


def report(step: int, loss: float = 2.0) -> StepReport:
    return StepReport(
        step=step,
        loss=loss,
        grad_norm=0.5,
        tokens=100,
        supervised_tokens=10,
        step_s=0.5,
        data_wait_s=0.1,
        device_wait_s=0.3,
        rates={"llm": 1e-3},
        source_losses={"captions": 2.0},
    )


def evaluation(values: dict[str, float]) -> Evaluation:
    return Evaluation(values, by_type={}, overall={}, predictions=[], bad=[])


def test_the_peak_is_that_of_the_process_and_not_of_its_launcher() -> None:
    launched = "from train.engine.observers import peak_memory_gib; print(peak_memory_gib())"
    launcher = """
import subprocess, sys
held = bytearray(b"1") * 2**31
print(subprocess.run([sys.executable, "-c", sys.argv[1]], check=True, capture_output=True, text=True).stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", launcher, launched], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert 0.05 < float(done.stdout) < 1.5  # the imports alone; the launcher holds 2 GiB


def test_a_line_a_step(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.on_step(report(1))
    metrics.close(failed=False)
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line)
    assert values.pop("memory/peak_gib") > 0
    assert values == {
        "step": 1,
        "loss": 2.0,
        "loss/captions": 2.0,
        "grad_norm": 0.5,
        "lr/llm": 1e-3,
        "not_finite": 0,
        "tokens": 100,
        "supervised_tokens": 10,
        "tokens_per_s": 200.0,
        "time/step_s": 0.5,
        "time/data_wait_s": 0.1,
        "time/device_wait_s": 0.3,
    }


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.on_evaluation(1, evaluation({"eval/loss": float("nan"), "eval/other": float("inf")}))
    metrics.close(failed=False)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "eval/loss": null, "eval/other": null}\n'


def test_resuming_forgets_the_steps_that_are_run_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(file, 2).close(failed=False)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_starting_anew_forgets_the_evaluation_before_the_first_step_too(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "eval/loss": 1}\n{"step": 1}\n')
    MetricsFile(file, -1).close(failed=False)
    assert file.read_text() == ""


@pytest.mark.parametrize("broken", [b"\xff\xfe\n", b"3\n", b'{"step": null}\n', b"[" * 9999 + b"\n"])
def test_resuming_drops_lines_that_are_no_steps(broken: bytes, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + broken + '{"step": 2, "loss/Töne\x85": 1}\n'.encode())
    MetricsFile(file, 2).close(failed=False)
    assert file.read_text() == '{"step": 1}\n{"step": 2, "loss/Töne\x85": 1}\n'
