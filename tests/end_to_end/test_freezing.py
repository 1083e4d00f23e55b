"""Frozen is frozen: for each of the 31 combinations of the flags, and for LoRA's base."""

from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.runs import SAMPLE, build_here, succeed, write_records
from train.config import MODULES
from train.families.family import Family
from train.families.gemma4 import GEMMA4
from train.families.megrezo import MEGREZO
from train.families.qwen_omni import QWEN_OMNI
from train.modules.trainable import FROZEN, canonical_name, is_adapter, module_of

pytestmark = pytest.mark.end_to_end

COMBINATIONS = [flags for flags in product([False, True], repeat=len(MODULES)) if any(flags)]


def words(folder: Path) -> list[str]:
    return [
        *write_records(folder),
        "data.eval=[]",
        "run.max_steps=2",
        "optim.warmup_ratio=0",
        f"run.dir={folder / 'run'}",
    ]


def test_there_are_31_combinations() -> None:
    assert len(COMBINATIONS) == 31


TINY = {MEGREZO.name: "tiny", QWEN_OMNI.name: "tiny_qwen_omni", GEMMA4.name: "tiny_gemma4"}


def cases() -> Iterator[Any]:
    """All combinations of all families; of the other two, CI takes those with one flag on, one off, or none."""
    for family, flags in product([MEGREZO, QWEN_OMNI, GEMMA4], COMBINATIONS):
        is_left_out = family is not MEGREZO and sum(flags) in (2, 3)
        name = f"{family.name}-{''.join('01'[flag] for flag in flags)}"
        yield pytest.param(family, flags, id=name, marks=[pytest.mark.exhaustive] if is_left_out else [])


@pytest.mark.parametrize(("family", "flags"), cases())
def test_exactly_the_tuned_modules_change(family: Family, flags: tuple[bool, ...], tmp_path: Path) -> None:
    tuned = {name for name, flag in zip(MODULES, flags, strict=True) if flag}
    model = TINY[family.name]
    run = build_here(
        [f"model={model}", *words(tmp_path), *(f"modules.tune_{name}={name in tuned}" for name in MODULES)]
    )
    run.trainer.fit()
    before = load_file(run.base / "model.safetensors")
    after = load_file(run.export() / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {module_of(name, family.rules) for name in before if not after[name].equal(before[name])}
    assert changed == tuned
    kept = {module_of(name, family.rules) for name in before} - set(MODULES)
    assert kept == ({"per_layer_table"} if family is GEMMA4 else {FROZEN})


def test_gemmas_table_learns_where_it_is_tuned(tmp_path: Path) -> None:
    flags = [*(f"modules.tune_{name}=false" for name in MODULES), "modules.tune_per_layer_table=true"]
    run = build_here(["model=tiny_gemma4", *words(tmp_path), *flags, "modules.lr.per_layer_table=1e-3"])
    run.trainer.fit()
    before, after = (load_file(folder / "model.safetensors") for folder in (run.base, run.export()))
    changed = {module_of(name, GEMMA4.rules) for name in before if not after[name].equal(before[name])}
    assert changed == {"per_layer_table"}


def test_lora_leaves_the_base_alone_and_changes_the_adapter(tmp_path: Path) -> None:
    run = build_here(["+recipe=lora", *words(tmp_path)])
    model = run.trainer.train_step.engine.model
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run.trainer.fit()
    for name, parameter in model.named_parameters():
        module = module_of(name, MEGREZO.rules)
        learns = is_adapter(name) or module in ("vision_proj", "audio_proj")
        if not learns:
            assert parameter.equal(start[name]), name
    lora_b = [name for name in start if ".lora_B." in name]
    assert lora_b
    weights = dict(model.named_parameters())
    assert not any(weights[name].equal(start[name]) for name in lora_b)
    assert {module_of(name, MEGREZO.rules) for name in lora_b} == {"llm"}
    base = load_file(run.base / "model.safetensors")
    for name, parameter in model.named_parameters():
        if ".base_layer." in name:
            assert parameter.equal(base[canonical_name(name)])


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3_offload"])
def test_weight_decay_does_not_move_what_no_sample_uses(engine: str, tmp_path: Path) -> None:
    lines = (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if '"type": "text"' in line][:12]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    source = f"data.train=[{{path: {tmp_path / 'texts.jsonl'}}}]"
    run = tmp_path / "run"
    succeed(
        [
            *(source, "data.eval=[]", f"engine={engine}", "optim.weight_decay=0.5", "optim.warmup_ratio=0"),
            *("run.max_steps=2", "run.packs_per_step=1", "run.epochs=2", "tracker=none", f"run.dir={run}"),
        ],
        processes=2,
    )
    before = load_file(run / "initial_model" / "model.safetensors")
    after = load_file(run / "export" / "model.safetensors")
    changed = {module_of(name, MEGREZO.rules) for name in before if not after[name].equal(before[name])}
    assert changed == {"llm"}


def test_old_moments_do_not_move_what_no_sample_uses(tmp_path: Path) -> None:
    run = build_here([*words(tmp_path), "optim.schedule=constant"])
    step, records = run.trainer.train_step, run.trainer.steps_from(0, 0).records
    step.engine.model.train()
    kinds = run.trainer.steps_from(0, 0).plan.measured.types

    def train_on(number: int, kind: str) -> dict[str, Tensor]:
        step(number, [records.batch([index for index, found in enumerate(kinds) if found == kind])[0]])
        return {name: parameter.detach().clone() for name, parameter in step.engine.model.named_parameters()}

    states = [train_on(0, "spoken_picture"), train_on(1, "typed_picture"), train_on(2, "text")]
    for (before, after), idle in zip(pairwise(states), [{"audio"}, {"audio", "vision"}], strict=True):
        changed = {name.split(".")[0] for name in before if not after[name].equal(before[name])}
        assert changed == {"llm", "vision", "audio"} - idle
