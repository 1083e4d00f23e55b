"""A model folder made of the folder that training started from, and what was trained."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from train.families import find
from train.modules.adapters import LoraSettings, add_adapters, load_trained, merge, save_adapter

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")


def export(
    base: Path,
    trained: Mapping[str, Tensor],
    folder: Path,
    *,
    lora: LoraSettings | None = None,
    fully_tuned: tuple[str, ...] = (),
) -> None:
    """Write `base` with the trained values in place to `folder`; with LoRA merged, and apart in adapter/.

    base: folder of the model that training started from.
    trained: float32 values by parameter name, adapters among them.
    fully_tuned: modules that were tuned in full beside the adapters; they go with the adapter.

    Weights keep the dtype they have in `base`, and side files are copied. A QLoRA adapter is merged onto these weights
    too, as other tools merge and load it, and not onto the 4-bit ones it learned beside: the export has the adapter's
    work and none of the rounding.
    """
    family = find(base)
    model = family.load_model(base)
    folder.mkdir(parents=True, exist_ok=True)
    if lora:
        adapted = add_adapters(model, family.rules, lora, fully_tuned=fully_tuned, in_float32=True)
        load_trained(adapted, trained)
        save_adapter(adapted, folder / "adapter", base)
        model = merge(adapted)
    else:
        load_trained(model, trained)
    model.save_pretrained(folder)
    copy_side_files(base, folder)


def copy_side_files(base: Path, folder: Path) -> None:
    """Copy what is not weights (tokenizer, settings, foreign files) and not there yet."""
    for file in base.iterdir():
        target = folder / file.name
        if file.is_file() and not target.exists() and not any(file.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(file, target)


def write_random_model(settings: Path, folder: Path, seed: int) -> None:
    """Write a model of the configuration in `settings` with weights drawn from `seed`, side files included."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    find(settings).random_model(settings, seed).to(torch.float32).save_pretrained(aside)
    copy_side_files(settings, aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
