"""Rules between the options of what is trained: modules, adapters, layers."""

from collections.abc import Collection
from dataclasses import fields

import torch

from train.checks.chosen import tuned_modules
from train.config import PARTS, LoraOptions, Options, Precision


def tuning_faults(options: Options) -> list[str]:
    tuned = tuned_modules(options)
    if not tuned:
        flags = ", ".join(f"modules.tune_{name}" for name in PARTS)
        return [f"nothing is tuned: set at least one of {flags} to true"]
    adapted = options.lora.modules
    faults = [
        f"lora.modules: there is no module '{name}'; choose from {', '.join(PARTS)}"
        for name in adapted
        if name not in PARTS
    ]
    if adapted and not faults and not set(adapted) & set(tuned):
        faults.append(
            f"LoRA has nothing to adapt: lora.modules is [{', '.join(adapted)}], but none of them is tuned; "
            f"set modules.tune_{adapted[0]}=true, or lora=none"
        )
    faults += [
        f"lora.targets.{name}: it is not among lora.modules, so nothing would read it"
        for name in options.lora.targets
        if adapted and name not in adapted
    ]
    if adapted and options.lora.lr == 0:
        faults.append("lora.lr is 0; adapters need a rate above 0")
    faults += [
        f"modules.lr.{name} is {rate}; a module that is tuned needs a rate above 0"
        for name in tuned
        if (rate := getattr(options.modules.lr, name)) == 0
    ]
    return faults


def lora_faults(options: Options) -> list[str]:
    lora = options.lora
    if not lora.modules:
        usual = LoraOptions()
        changed = {item.name for item in fields(lora) if getattr(lora, item.name) != getattr(usual, item.name)}
        return idle_lora(options, {f"lora.{name}" for name in changed - {"lr"}})  # model groups propose a rate
    faults = []
    start = lora.init_lora_weights
    if str(start).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        faults.append(
            f"lora.init_lora_weights={start} moves part of the base into the adapter, which then fits no model but the "
            "changed one; use true, gaussian or orthogonal, which leave the base as it is"
        )
    elif start not in (True, "gaussian", "orthogonal"):
        faults.append(f"lora.init_lora_weights is '{start}'; use true, gaussian or orthogonal")
    if start == "orthogonal" and lora.rank % 2:
        faults.append(f"lora.init_lora_weights=orthogonal needs an even lora.rank, and it is {lora.rank}")
    if start == "orthogonal" and lora.load_in_4bit:
        faults.append(
            "lora.init_lora_weights=orthogonal would be rounded to whole bytes by peft beside 4-bit weights; "
            "use true or gaussian"
        )
    if lora.load_in_4bit and not (options.modules.tune_llm and "llm" in lora.modules):
        faults.append(
            "lora.load_in_4bit is for a language model that learns through adapters alone; "
            "put llm among lora.modules and set modules.tune_llm=true, or lora.load_in_4bit=false"
        )
    return faults


def idle_lora(options: Options, given: Collection[str]) -> list[str]:
    """A fault for each option of adapters among the `given` names where there are none."""
    return [
        f"{name} is set, but lora.modules is empty, so all would learn in full; add lora=lora, or leave it out"
        for name in sorted(given)
        if not options.lora.modules and name.startswith("lora.") and name != "lora.modules"
    ]


def layer_faults(options: Options) -> list[str]:
    faults = [
        f"run.activation_checkpointing.{part} is '{value}'; use none, full, or n for every n-th layer (2, 3, ...)"
        for part, value in vars(options.run.activation_checkpointing).items()
        if value not in ("none", "full") and not (value.isdecimal() and int(value))
    ]
    if not options.run.compile:
        return faults
    if options.engine.name.zero_stage == 3:
        faults.append(
            f"run.compile: engine={options.engine.name} gathers weights inside of layers, which then cannot be "
            "compiled; use engine=zero2, or leave the option out"
        )
    if options.lora.use_dora:
        faults.append("run.compile: peft's DoRA cannot be compiled; use lora=lora, or leave the option out")
    if torch.cuda.is_available() and options.run.precision is Precision.fp32:
        faults.append("run.compile: on CUDA it needs run.precision=bf16, since attention in fp32 waits for the host")
    return faults
