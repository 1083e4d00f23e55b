"""Small runs as a user starts them: deterministic resume, a killed worker, waits for data, the export's check."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from real_size import ROOT

from gpu_stages.figures import Setting, Skipped, equal_bits, figure

STEPS = 4

RUNS = {
    "none": ("engine=none", "lora=none"),
    "LoRA with dropout": ("engine=none", "lora=lora", "lora.dropout=0.1"),
    "zero2": ("engine=zero2", "lora=none"),
}


def _words(setting: Setting, run: Path, extra: tuple[str, ...]) -> list[str]:
    sample = ROOT / "data" / "sample"
    lines = (sample / "train.jsonl").read_text(encoding="utf-8").splitlines()
    records = setting.folder / "few.jsonl"
    records.write_text("\n".join(lines[: setting.of_size(200, 24)]), encoding="utf-8")
    return [
        *("model=tiny", f"data.train=[{{path: {records}, root: {sample}}}]", "data.eval=[]", "tracker=none"),
        *(f"run.dir={run}", f"run.max_steps={STEPS}", "run.epochs=50", "run.packs_per_step=2", "data.max_tokens=512"),
        *("data.workers=1", "run.deterministic=true", "checkpoint.save_every=2", "data.cache=null", *extra),
    ]


def _train(setting: Setting, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "train/main.py", *words], cwd=ROOT, env=_environment(setting), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"training ended with {done.returncode}:\n{done.stderr[-3000:]}")


def _environment(setting: Setting) -> dict[str, str]:
    told = {} if setting.device == "cuda" else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return dict(os.environ) | told


def _steps(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if '"loss"' in line and line.endswith("}")]


def _losses(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in _steps(run)]


def resume(setting: Setting, name: str) -> list[dict[str, Any]]:
    """Steps that are run again from a checkpoint have the same losses and gradient norms, bit for bit."""
    run = setting.folder / f"run-{name.replace(' ', '-')}"
    words = _words(setting, run, RUNS[name])
    began = time.monotonic()
    _train(setting, words)
    seconds = time.monotonic() - began
    before = _losses(run)
    report = json.loads((run / "export" / "export.json").read_text())
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:06d}")
    shutil.rmtree(run / "export")
    _train(setting, words)
    return [
        equal_bits("losses after resuming", len(before) == STEPS and _losses(run) == before),
        figure("the export's check", float(report["ok"]), "1 = passed", at_least=1),
        figure("from the command to the export", seconds, "s"),
    ]


def killed_worker(setting: Setting) -> list[dict[str, Any]]:
    """A decoding process is killed beneath the thread that pins memory; the run goes on, and how soon."""
    run = setting.folder / "run-killed-worker"
    words = [*_words(setting, run, RUNS["none"]), "run.max_steps=100000", "run.epochs=100000"]
    log = setting.folder / "killed.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "train/main.py", *words], cwd=ROOT, env=_environment(setting), stdout=out, stderr=out
        )
    try:
        _until(lambda: len(_steps(run)) >= 3, process, log, setting.of_size(90, 240))
        workers = psutil.Process(process.pid).children(recursive=True)
        if not workers:
            raise Skipped("the run has no worker")
        workers[-1].kill()
        began, done = time.monotonic(), len(_steps(run))
        # more steps than were decoded ahead
        _until(lambda: len(_steps(run)) >= done + 12, process, log, setting.of_size(90, 240))
        seconds = time.monotonic() - began
        share = [line["time/data_wait_s"] / line["time/step_s"] for line in _steps(run)[1:3]]
    finally:
        for left in [*psutil.Process(process.pid).children(recursive=True), process]:
            left.kill()
        process.wait()
    return [
        figure("until twelve more steps were done", seconds, "s", at_most=30),
        setting.speed("waiting for data", sum(share) / len(share), "share of the step", at_most=0.02),
    ]


def _until(happened: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the run ended or took over {limit_s:.0f} s:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)
