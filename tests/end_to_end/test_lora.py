"""The LoRA family beside fully tuned connectors: resumed exactly, exported as trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import train.auto  # noqa: F401
from tests.runs import build_here, losses, metrics, succeed, write_records
from train.engine.build import Run
from train.modules.trainable import canonical_name
from train.schema import Batch

pytestmark = pytest.mark.end_to_end

TOWERS = [
    "modules.tune_vision_encoder=true",
    "modules.tune_audio_encoder=true",
    "lora.modules=[llm,vision_encoder,audio_encoder]",
]


def words(folder: Path, out: str = "run") -> list[str]:
    """Evaluation before the first step, dropout on."""
    return [
        *write_records(folder),
        f"run.dir={folder / out}",
        "run.max_steps=4",
        "checkpoint.save_every=2",
        "data.max_tokens=256",
        "optim.warmup_ratio=0",
        "eval.max_new_tokens=4",
    ]


def trained_and_exported(run: Run) -> tuple[Any, Batch, dict[str, Tensor]]:
    """The trained model, a batch, and the logits for it: of the base, the model, its export, the adapter by peft."""
    trained = run.trainer.train_step.engine.model.eval().get_base_model()
    exported = run.export()
    batch = next(iter(run.trainer.steps_from(0, 0))).batches[0]
    base = AutoModelForCausalLM.from_pretrained(run.base).eval()
    with torch.no_grad():
        logits = {
            "base": base.logits(batch),
            "trained": trained.logits(batch),
            "merged": AutoModelForCausalLM.from_pretrained(exported).eval().logits(batch),
            "adapted": PeftModel.from_pretrained(base, exported / "adapter").eval().get_base_model().logits(batch),
        }
    return trained, batch, logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    "how",
    [
        ["lora=lora"],
        ["lora=lora", "lora.init_lora_weights=orthogonal", *TOWERS],
        ["lora=dora", "lora.init_lora_weights=gaussian"],
        ["lora=rslora"],
    ],
    ids=["lora", "towers", "dora", "rslora"],
)
def test_resumed_merged_and_plain_peft_agree(how: list[str], tmp_path: Path) -> None:
    how = ["+recipe=lora", *how]
    run = build_here([*how, *words(tmp_path)])
    run.trainer.fit()
    _, _, logits = trained_and_exported(run)
    assert distance(logits["base"], logits["trained"]) > 0.1
    assert distance(logits["merged"], logits["trained"]) < 1e-4
    assert distance(logits["adapted"], logits["trained"]) < 1e-4
    assert resumed_losses(how, tmp_path) == losses(tmp_path / "run")[2:]


def resumed_losses(how: list[str], folder: Path) -> list[float]:
    """What a second run makes of the first one's checkpoint after two of four steps."""
    checkpoint = folder / "run/checkpoints/step-000002"
    build_here([*how, *words(folder, "again"), f"run.resume={checkpoint}"]).trainer.fit()
    return losses(folder / "again")


def test_qlora_is_exported_onto_the_base_as_it_was(tmp_path: Path) -> None:
    """The export lacks the rounding that the trained model had in its base, and nothing else."""
    how = ["+recipe=qlora"]
    run = build_here([*how, *words(tmp_path)])
    packed = {n: p.clone() for n, p in run.trainer.train_step.engine.model.named_parameters() if p.dtype == torch.uint8}
    run.trainer.fit()
    after = dict(run.trainer.train_step.engine.model.named_parameters())
    assert len(packed) == 4 * 7
    assert all(after[name].equal(weight) for name, weight in packed.items())

    trained, batch, logits = trained_and_exported(run)
    assert distance(logits["merged"], logits["adapted"]) < 1e-4
    relative = (logits["merged"] - logits["trained"]).norm() / logits["trained"].norm()
    assert 0.01 < relative < 0.5  # 0.25 measured, where the base without its adapter is 0.99 away
    rounded = AutoModelForCausalLM.from_pretrained(run.base)
    with torch.no_grad():
        for name, layer in trained.named_modules():
            if isinstance(layer, Linear4bit):
                weight = rounded.get_parameter(canonical_name(f"{name}.weight"))
                weight.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        adapter = PeftModel.from_pretrained(rounded, run.folder.export / "adapter")
        assert distance(adapter.eval().get_base_model().logits(batch), logits["trained"]) < 1e-4
    assert resumed_losses(how, tmp_path) == losses(tmp_path / "run")[2:]


@pytest.mark.parametrize(
    ("lora", "engine", "precision"),
    [
        ("dora", "ddp", "fp32"),
        ("qlora", "zero2", "fp32"),
        ("lora", "zero3", "fp32"),
        ("qlora", "zero3", "bf16"),
    ],
)
def test_two_ranks(lora: str, engine: str, precision: str, tmp_path: Path) -> None:
    """They learn, evaluate, export, and resume exactly; in float32 with the losses of one rank, dropout included."""
    how = ["+recipe=lora", f"lora={lora}", f"run.precision={precision}", "run.packs_per_step=3", "data.workers=0"]
    how += ["tracker=none", "lora.dropout=0.3"]
    succeed([*how, f"engine={engine}", *words(tmp_path)], processes=2)
    run = tmp_path / "run"
    assert losses(run)[-1] < losses(run)[0]
    assert (run / "export/adapter/adapter_model.safetensors").is_file()
    assert json.loads((run / "export/export.json").read_text())["ok"]
    checkpoint = run / "checkpoints/step-000002"
    again = tmp_path / "again"
    succeed([*how, f"engine={engine}", *words(tmp_path, "again"), f"run.resume={checkpoint}"], processes=2)
    assert losses(again) == losses(run)[2:]
    assert metrics(again)[-1]["eval/loss"] == metrics(run)[-1]["eval/loss"]
    if precision == "fp32":
        alone = [*how, *words(tmp_path, "alone"), "checkpoint.save_every=0", "run.activation_checkpointing=full"]
        build_here(alone).trainer.fit()
        assert losses(run) == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
