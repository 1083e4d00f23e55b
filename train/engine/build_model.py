"""Options into the model that is trained: its weights, what learns, and in which dtype."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from train.checks.chosen import tuned_modules
from train.config import Options, Precision
from train.engine.accelerator import zero_stage
from train.errors import ConfigError
from train.export.from_checkpoint import lora_settings
from train.export.model_folder import check_base
from train.families.family import Family
from train.modules.adapters import add_adapters, quantize_linear_layers
from train.modules.layers import checkpoint_layers, compile_layers
from train.modules.packed import PackedModel
from train.modules.trainable import canonical_name, choose_trainable, module_of


def check_family(options: Options, family: Family) -> None:
    """Raise ConfigError where the options name what models of the family do not have."""
    known = f"a {family.name} model has only {', '.join(sorted(family.modules))}"
    faults = [
        f"modules.tune_{name}: there is no such module, {known}; set it to false, as the model group of the family does"
        for name in tuned_modules(options)
        if name not in family.modules
    ]
    faults += [
        f"lora.modules: there is no module '{name}', {known}; leave it out"
        for name in options.lora.modules
        if name not in family.modules
    ]
    faults += [
        f"lora.modules: {name} has no linear layer to adapt; leave it out"
        for name in options.lora.modules
        if name in family.modules and not family.lora_targets[name] and name not in options.lora.targets
    ]
    if options.run.compile and not family.compiles:
        faults.append(f"run.compile: the layers of a {family.name} model cannot be compiled; leave the option out")
    if options.export.with_code and not family.auto_classes:
        faults.append(f"export.with_code: transformers has a {family.name} model's code itself; leave the option out")
    if faults:
        raise ConfigError(faults)


def compute_dtype_of(options: Options) -> torch.dtype:
    """What the model computes in."""
    return torch.bfloat16 if options.run.precision is Precision.bf16 else torch.float32


def load_model(options: Options, family: Family, base: Path, device: torch.device) -> nn.Module:
    """The model with what is trained chosen: float32 where master weights are made of it, else in the compute dtype.

    device: where the model will live; under DeepSpeed, its engine moves what it does not offload.
    """
    compute_dtype, in_float32 = weight_dtypes(options, family)
    model = family.load_model(
        base, dtype=compute_dtype, in_float32=in_float32, device=None if zero_stage(options) else device
    )
    if options.lora.load_in_4bit:
        quantize_linear_layers(model, family.rules, "llm", compute_dtype=compute_dtype, device=device)
    adapted_model = with_trainable(options, family, model)
    trained = [canonical_name(name) for name, value in adapted_model.named_parameters() if value.requires_grad]
    check_base(base, adapted_model, trained)
    if options.run.compile:
        compile_layers(model)
    return adapted_model


def weight_dtypes(options: Options, family: Family) -> tuple[torch.dtype, Callable[[str], bool] | None]:
    """The dtype of the weights, and which of them, by name, are float32 all the same: those that master weights are
    made of; None where none is.
    """
    in_full = set(tuned_modules(options)) - set(options.lora.modules)
    for_masters = _in_float32_for_masters(options)
    return compute_dtype_of(options), (lambda name: module_of(name, family.rules) in in_full) if for_masters else None


def _in_float32_for_masters(options: Options) -> bool:
    """DeepSpeed wants one dtype, and makes its master weights of that."""
    return options.run.precision is Precision.bf16 and not zero_stage(options)


def with_trainable(options: Options, family: Family, model: PackedModel) -> nn.Module:
    """The model as it is trained: the kind of loss, checkpointing of activations, adapters, what learns."""
    model.liger_loss = options.run.liger_loss
    adapted_model: nn.Module = model
    if options.lora.modules:
        settings = lora_settings(options, family)
        adapted_model = add_adapters(model, family.rules, settings, in_float32=_in_float32_for_masters(options))
    choose_trainable(adapted_model, family.rules, tuned=tuned_modules(options), adapted=options.lora.modules)
    checkpoint_layers(model, **options.run.activation_checkpointing.intervals())
    return adapted_model
