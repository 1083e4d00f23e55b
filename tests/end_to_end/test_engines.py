"""Every engine on two ranks: the losses of one rank, exports that are whole."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import losses, metrics, succeed, write_records

pytestmark = pytest.mark.end_to_end

STEPS = 3
ENGINES = ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


def words(folder: Path, out: str) -> list[str]:
    """Three packs a step: two ranks cannot share them evenly.

    A larger eps, because Adam's first steps turn rounding noise into steps of full size where a gradient is zero.
    """
    return [
        *write_records(folder, train=60),
        f"run.dir={folder / out}",
        f"run.max_steps={STEPS}",
        "run.packs_per_step=3",
        "data.max_tokens=256",
        "data.workers=1",
        "optim.warmup_ratio=0",
        "optim.eps=1e-6",
        "eval.max_new_tokens=4",
        "tracker=none",
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    succeed(["+recipe=full", "engine=none", *words(folder, "run")])
    return folder / "run"


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one(engine: str, alone: Path, tmp_path: Path) -> None:
    succeed(["+recipe=full", f"engine={engine}", *words(tmp_path, "run")], processes=2)
    run = tmp_path / "run"
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    assert [line["grad_norm"] for line in metrics(run) if "loss" in line] == pytest.approx(
        [line["grad_norm"] for line in metrics(alone) if "loss" in line], rel=1e-3
    )
    evaluations = [[line for line in metrics(folder) if "eval/loss" in line] for folder in (run, alone)]
    for mine, reference in zip(*evaluations, strict=True):
        assert mine == pytest.approx(reference, abs=1e-4)
    exported = load_file(run / "export" / "model.safetensors")
    reference = load_file(alone / "export" / "model.safetensors")
    assert exported.keys() == reference.keys()
    for name, weight in exported.items():
        assert (weight - reference[name]).abs().max() < 2e-3, name


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_bf16_trains(engine: str, tmp_path: Path) -> None:
    succeed(["+recipe=full", f"engine={engine}", "run.precision=bf16", *words(tmp_path, "run")], processes=2)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_lora_on_two_ranks(engine: str, tmp_path: Path) -> None:
    succeed(["+recipe=lora", f"engine={engine}", *words(tmp_path, "run")], processes=2)
    run = tmp_path / "run"
    assert losses(run)[-1] < losses(run)[0]
    assert (run / "export" / "adapter" / "adapter_model.safetensors").is_file()
    base = load_file(run / "initial_model" / "model.safetensors")
    exported = load_file(run / "export" / "model.safetensors")
    assert exported.keys() == base.keys()
    assert exported["llm.model.embed_tokens.weight"].equal(base["llm.model.embed_tokens.weight"])
    assert not exported["llm.model.layers.0.mlp.up_proj.weight"].equal(base["llm.model.layers.0.mlp.up_proj.weight"])
