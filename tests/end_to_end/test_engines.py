"""Every engine on two ranks: the losses of one rank, exports that are whole."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import losses, metrics, succeed, write_records

pytestmark = pytest.mark.end_to_end

STEPS = 3
ENGINES = ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
TITLE = "the same steps under every engine"


def words(folder: Path, out: str, packs: int = 3) -> list[str]:
    """Two packs a step are one for each of two ranks; three are accumulated, and do not divide evenly.

    A larger eps, because Adam's first steps turn rounding noise into steps of full size where a gradient is zero.
    """
    return [
        *write_records(folder, train=60),
        f"run.dir={folder / out}",
        f"run.max_steps={STEPS}",
        f"run.packs_per_step={packs}",
        "data.max_tokens=256",
        "data.workers=0",
        "optim.warmup_ratio=0.4",
        "optim.eps=1e-6",
        "eval.max_new_tokens=4",
        "tracker=none",
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tables: dict[str, list[str]]) -> dict[int, Path]:
    """The run of one process, by packs a step."""
    runs = {}
    for packs in (2, 3):
        folder = tmp_path_factory.mktemp("alone")
        succeed(["+recipe=full", "engine=none", *words(folder, "run", packs)])
        runs[packs] = folder / "run"
        add_rows(tables, "none", 1, packs, folder / "run")
    return runs


def add_rows(tables: dict[str, list[str]], engine: str, ranks: int, packs: int, run: Path) -> None:
    """A line of the table for each step."""
    for line in metrics(run):
        if "loss" in line:
            step, rate = line["step"], line["lr/llm"]
            tables[TITLE].append(
                f"{engine:14} ranks {ranks}  packs {packs}  step {step}  loss {line['loss']:.6f}  "
                f"grad_norm {line['grad_norm']:.6f}  clipped to {min(line['grad_norm'], 1.0):.0f}  lr {rate:.6e}"
            )


@pytest.mark.parametrize(
    ("engine", "packs"), [*((engine, 3) for engine in ENGINES), ("ddp", 2), ("zero2", 2), ("zero3", 2)]
)
def test_two_ranks_equal_one(
    engine: str, packs: int, alone: dict[int, Path], tables: dict[str, list[str]], tmp_path: Path
) -> None:
    succeed(["+recipe=full", f"engine={engine}", *words(tmp_path, "run", packs)], processes=2)
    run, reference_run = tmp_path / "run", alone[packs]
    add_rows(tables, engine, 2, packs, run)
    steps, reference_steps = ([line for line in metrics(folder) if "loss" in line] for folder in (run, reference_run))
    assert len(steps) == STEPS
    for mine, reference in zip(steps, reference_steps, strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
        assert mine["grad_norm"] > 1, "nothing would be clipped"
        for name, rate in reference.items():
            if name.startswith("lr/"):
                assert mine[name] == rate
    evaluations = [[line for line in metrics(folder) if "eval/loss" in line] for folder in (run, reference_run)]
    for mine, reference in zip(*evaluations, strict=True):
        assert mine == pytest.approx(reference, abs=1e-4)
    exported = load_file(run / "export" / "model.safetensors")
    reference = load_file(reference_run / "export" / "model.safetensors")
    assert exported.keys() == reference.keys()
    for name, weight in exported.items():
        assert (weight - reference[name]).abs().max() < 2e-3, name


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_bf16_trains(engine: str, tmp_path: Path) -> None:
    succeed(["+recipe=full", f"engine={engine}", "run.precision=bf16", *words(tmp_path, "run")], processes=2)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_bf16_beside_fp32_masters_on_two_ranks_equals_one(tmp_path: Path) -> None:
    """Each pack's gradient is rounded to bf16, but their sum over packs and ranks is not."""
    for engine, processes in (("none", 1), ("ddp", 2)):
        command = ["+recipe=full", f"engine={engine}", "run.precision=bf16", *words(tmp_path, engine)]
        succeed(command, processes=processes)
    assert losses(tmp_path / "ddp") == pytest.approx(losses(tmp_path / "none"), abs=1e-4)
    norms = [[line["grad_norm"] for line in metrics(tmp_path / engine) if "loss" in line] for engine in ("none", "ddp")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_an_augmented_run_is_the_same_with_workers_and_on_two_ranks(tmp_path: Path) -> None:
    changes = "data.augment={speed: [0.9, 1, 1.1], noise_db: [0, 20], echo_s: [0.1, 0.4], time_mask: 20, color: 0.3}"
    for run, processes, more in (
        *(("alone", 1, ["engine=none", changes]), ("workers", 1, ["engine=none", changes, "data.workers=2"])),
        *(("ranks", 2, ["engine=ddp", changes]), ("plain", 1, ["engine=none"])),
    ):
        command = ["+recipe=full", *words(tmp_path, run), "data.eval=[]", "checkpoint.save_every=0", *more]
        succeed(command, processes=processes)
    alone, workers, ranks, plain = (losses(tmp_path / run) for run in ("alone", "workers", "ranks", "plain"))
    assert workers == alone
    assert ranks == pytest.approx(alone, abs=1e-4)
    assert plain != pytest.approx(alone, abs=1e-2), "nothing was changed"


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
