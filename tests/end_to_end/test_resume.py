"""A run that was stopped goes on: bit for bit at the same world size, within rounding under any other engine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.runs import (
    launch,
    losses,
    metrics,
    succeed,
    write_records,
    write_small_gemma4,
    write_small_model,
    write_small_qwen_omni,
)
from train.export.checkpoint_reader import MASTER, MOMENTS, read_state, saved_state

pytestmark = pytest.mark.end_to_end

STEPS, STOP = 8, 4


def words(folder: Path, out: str = "run") -> list[str]:
    """Three packs a step, which two ranks cannot share evenly, over more than one epoch."""
    if not (folder / "model").exists():
        write_small_model(folder)
    return [
        *write_records(folder, train=48),
        *(f"model.random_from={folder / 'model'}", f"run.dir={folder / out}", "data.eval=[]", "tracker=none"),
        *(f"run.max_steps={STEPS}", "run.epochs=9", "run.packs_per_step=3", "data.max_tokens=256", "data.workers=0"),
        *(
            "optim.eps=1e-6",
            "optim.warmup_ratio=0.3",
            "checkpoint.save_every=2",
            "checkpoint.keep_last=0",
            "run.threads=1",
        ),
    ]


def go_back(run: Path, step: int) -> Path:
    """Leave of a run what a kill right after the checkpoint of `step` would have left."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(run / "export", ignore_errors=True)
    return run / "checkpoints" / f"step-{step:06d}"


@pytest.mark.parametrize(
    ("engine", "processes", "more"),
    [
        ("none", 1, ["run.precision=bf16"]),
        ("none", 1, ["run.precision=bf16", "optim.name=adamw_8bit"]),
        ("ddp", 2, ["run.precision=bf16", "optim.name=muon"]),
        (
            *("ddp", 2),
            [
                *("lora=lora", "lora.modules=[llm]", "lora.dropout=0.2", "data.augment.speed=[0.9,1,1.1]"),
                *("data.augment.noise_db=[0,20]", "data.augment.time_mask=20", "data.augment.color=0.3"),
            ],
        ),
        ("zero2", 2, ["run.precision=bf16"]),
        ("zero3", 2, ["lora=lora", "lora.modules=[llm]", "lora.dropout=0.2", "run.precision=bf16"]),
        ("zero3_offload", 2, []),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_resumed_losses_are_the_uninterrupted_runs_bit_for_bit(
    engine: str, processes: int, more: list[str], tmp_path: Path
) -> None:
    command = [*words(tmp_path), f"engine={engine}", *more]
    succeed(command, processes=processes)
    run = tmp_path / "run"
    straight = metrics(run)
    go_back(run, STOP)
    succeed(command, processes=processes)
    resumed = metrics(run)
    for name in ("step", "loss", "grad_norm", "tokens"):
        assert [line[name] for line in resumed] == [line[name] for line in straight]
    assert len(resumed) == STEPS


@pytest.mark.parametrize(
    ("write_model", "engine"),
    [(write_small_qwen_omni, "ddp"), (write_small_qwen_omni, "zero3"), (write_small_gemma4, "zero3")],
)
def test_another_family_resumes_bit_for_bit(write_model: Callable[[Path], Path], engine: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    command = [*words(tmp_path), f"engine={engine}"]
    succeed(command, processes=2)
    straight = metrics(tmp_path / "run")
    go_back(tmp_path / "run", STOP)
    succeed(command, processes=2)
    resumed = metrics(tmp_path / "run")
    assert len(resumed) == STEPS
    for name in ("step", "loss", "grad_norm", "tokens"):
        assert [line[name] for line in resumed] == [line[name] for line in straight]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run alone, and the same as far as STOP on two ranks under two engines."""
    folder = tmp_path_factory.mktemp("elastic")
    succeed([*words(folder, "alone"), "engine=none"])
    for engine in ("zero2", "zero3"):
        succeed([*words(folder, engine), f"engine={engine}"], processes=2)
        go_back(folder / engine, STOP)
    return {name: folder / name for name in ("alone", "zero2", "zero3")}


@pytest.mark.parametrize(
    ("first", "then", "processes"),
    [("zero2", "none", 1), ("zero2", "zero3", 3), ("zero3", "ddp", 2), ("zero3", "zero2", 3), ("zero2", "zero1", 1)],
)
def test_another_engine_and_world_size_go_on_with_the_same_state(
    first: str, then: str, processes: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = runs["alone"].parent
    run = tmp_path / "run"
    shutil.copytree(runs[first], run)
    command = [*words(folder, first)[:-1], f"run.dir={run}", "run.threads=1", f"engine={then}"]
    saved = run / "checkpoints" / f"step-{STOP:06d}"

    succeed(command, processes=processes, script="tests/end_to_end/state_of.py")
    again = run / "again" / saved.name
    shapes = read_state(saved)["parameters"]
    assert read_state(again)["parameters"] == shapes
    with saved_state(saved) as before, saved_state(again) as after:
        for name, shape in shapes.items():
            for kind in (MASTER, *MOMENTS):
                size = torch.Size(shape).numel()
                values = [state.read(kind, name, 0, size) for state in (before, after)]
                assert values[0].equal(values[1]), (kind, name)
                assert kind == MASTER or values[0].any(), (kind, name)
    settings = json.loads((run / "again" / "settings.json").read_text())
    assert settings["updates"] == [STOP]
    assert {group["weight_decay"] for group in settings["groups"]} == {0.0, 0.1}
    fifth = metrics(runs["alone"])[STOP]
    for group in settings["groups"]:
        assert group["lr"] > 0
        assert group["lr"] == pytest.approx(fifth[f"lr/{group['label']}"])

    succeed(command, processes=processes)
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(runs["alone"]), abs=1e-4)


def test_fp32_masters_beside_bf16_weights_go_to_zero_and_back(tmp_path: Path) -> None:
    """Their own values, to the bit: no rounding to bf16 on the way."""
    command = [*words(tmp_path), "run.precision=bf16", "run.max_steps=2"]
    succeed([*command, "engine=none"])
    places = [tmp_path / "run/checkpoints/step-000002"]
    for engine, processes in (("zero2", 2), ("none", 1)):
        run = tmp_path / f"on-{engine}"
        more = [f"engine={engine}", f"run.dir={run}", f"run.resume={places[-1]}"]
        succeed([*command, *more], processes=processes, script="tests/end_to_end/state_of.py")
        places.append(run / "again/step-000002")
    first, *others = (everything(place) for place in places)
    assert any(not values.equal(values.bfloat16().float()) for values in first.values())
    for other in others:
        assert other.keys() == first.keys()
        assert all(values.equal(first[key]) for key, values in other.items())


def test_another_optimizers_state_is_refused(tmp_path: Path) -> None:
    command = [*words(tmp_path), "engine=none", "run.max_steps=2"]
    succeed([*command, "optim.name=muon"])
    done = launch([*command, f"run.dir={tmp_path / 'other'}", f"run.resume={tmp_path / 'run/checkpoints/step-000002'}"])
    assert done.returncode == 1
    assert "the checkpoint holds the state of optim.name=muon, and this run has optim.name=adamw" in done.stderr


def everything(checkpoint: Path) -> dict[tuple[str, str], Tensor]:
    """The master weights and moments of a checkpoint, by kind and name."""
    with saved_state(checkpoint) as saved:
        return {
            (kind, name): saved.read(kind, name, 0, torch.Size(shape).numel())
            for name, shape in read_state(checkpoint)["parameters"].items()
            for kind in (MASTER, *MOMENTS)
        }
