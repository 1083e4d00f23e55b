"""A loss or gradient that is not finite: the step is left out on all ranks alike, and its records are named."""

from pathlib import Path

import pytest
import torch

from tests.runs import build_here, losses, metrics, succeed, write_records
from train.errors import TrainingError
from train.modules.packed import PackedOutput

pytestmark = pytest.mark.end_to_end


def words(folder: Path) -> list[str]:
    return [
        *write_records(folder, train=48),
        *(f"run.dir={folder / 'run'}", "data.eval=[]", "tracker=none", "run.max_steps=6", "run.epochs=9"),
        *("run.packs_per_step=2", "data.max_tokens=256", "data.workers=0", "run.threads=1"),
    ]


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_ranks_leave_the_step_out_together(engine: str, tmp_path: Path) -> None:
    script = "tests/end_to_end/not_finite.py"
    done = succeed([*words(tmp_path), f"engine={engine}"], processes=2, script=script)
    lines = metrics(tmp_path / "run")
    assert [line["not_finite"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[2]["grad_norm"] is None
    assert all(line["grad_norm"] > 0 for line in lines[3:])
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert "step 3 left out: the gradient, though not the loss, of" in done.stderr
    assert f"{tmp_path}/train.jsonl:" in done.stderr


def test_the_record_is_named_and_too_many_in_a_row_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = build_here([*words(tmp_path), "run.max_not_finite=1", "run.precision=fp32"])
    step = run.trainer.train_step
    batches = next(iter(run.trainer.steps_from(0, 0))).batches
    before = {name: parameter.detach().clone() for name, parameter in step.engine.model.named_parameters()}
    spoiled = batches[0].records[1]

    def spoil(_module, _inputs, output: PackedOutput) -> PackedOutput:
        token_losses = output.token_losses.clone()
        first = int((batches[0].target_positions < batches[0].cu_seqlens[1]).sum())
        if len(token_losses) == len(batches[0].targets):
            token_losses[first] = torch.nan
        return PackedOutput(loss_sum=output.loss_sum * torch.nan, token_losses=token_losses)

    step.engine.model.register_forward_hook(spoil)
    result = step(0, batches)
    assert not result.updated
    assert result.suspects == [spoiled]
    assert all(parameter.equal(before[name]) for name, parameter in step.engine.model.named_parameters())
    with pytest.raises(TrainingError, match=r"2 steps in a row .* run.max_not_finite"):
        run.trainer.fit()
    assert "step 2 left out" in caplog.text
