"""Runs with compiled layers: they resume bit for bit, and their exports are what was trained."""

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import launch, metrics

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("engine", "processes", "more"),
    [
        ("none", 1, ["run.activation_checkpointing.llm=2"]),
        ("ddp", 2, ["lora=lora", "lora.dropout=0.2"]),
        ("zero2", 2, ["run.precision=bf16"]),
    ],
    ids=["none", "ddp-lora", "zero2-bf16"],
)
def test_a_compiled_run_resumes_bit_for_bit_and_exports(
    engine: str, processes: int, more: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        *("model=tiny_instruct", "data=text", f"engine={engine}", f"run.dir={run}", "tracker=none", "data.eval=[]"),
        *("run.max_steps=4", "run.packs_per_step=2", "data.max_tokens=128", "data.workers=0", "optim.eps=1e-6"),
        *("checkpoint.save_every=2", "checkpoint.keep_last=0", "run.compile=true", *more),
    ]
    for _ in range(2):
        done = launch(command, processes=processes, timeout_s=850)  # minutes where no compiled kernels are cached
        assert done.returncode == 0, done.stderr[-6000:]
        assert json.loads((run / "export/export.json").read_text())["ok"]
        if not (tmp_path / "straight.jsonl").exists():
            shutil.copy(run / "metrics.jsonl", tmp_path / "straight.jsonl")
            shutil.rmtree(run / "checkpoints/step-000004")
            shutil.rmtree(run / "export")
    straight = [json.loads(line) for line in (tmp_path / "straight.jsonl").read_text().splitlines()]
    for name in ("step", "loss", "grad_norm", "tokens"):
        assert [line[name] for line in metrics(run)] == [line[name] for line in straight]
    assert len(straight) == 4
