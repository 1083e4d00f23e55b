"""Rules between the options and how the run was launched, and what is installed."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from packaging.version import Version

from train.config import Engine, OptimizerName, Options

_DEEPSPEED_BY_OPTION = {
    "train_batch_size": "run.packs_per_step",
    "train_micro_batch_size_per_gpu": "run.packs_per_step",
    "gradient_accumulation_steps": "run.packs_per_step",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16": "run.precision",
    "fp16": "run.precision",
    "amp": "run.precision",
    "torch_autocast": "run.precision",
    "optimizer": "optim",
    "scheduler": "optim",
}
"""Entries of DeepSpeed's configuration that our options decide, and which."""


def launch_faults(options: Options, world_size: int) -> list[str]:
    if options.engine.name is Engine.none and world_size > 1:
        return [f"engine=none is for one process, and {world_size} were launched; use engine=ddp or engine=zero2"]
    if options.optim.name is not OptimizerName.adamw and options.engine.name.zero_stage:
        return [
            f"optim.name={options.optim.name} updates whole parameters, and engine={options.engine.name} shards them "
            "or their state; use engine=none or engine=ddp, or optim.name=adamw"
        ]
    if options.lora.use_dora and options.engine.name.zero_stage == 3:
        return [
            f"lora.use_dora reads whole base weights outside the layers that engine={options.engine.name} gathers them "
            "for, so answers cannot be generated; use engine=zero2, or lora=lora"
        ]
    return []


def deepspeed_faults(options: Options) -> list[str]:
    entries = options.engine.deepspeed
    if entries and not options.engine.name.zero_stage:
        return [f"engine.deepspeed is set, but engine={options.engine.name} does not use DeepSpeed"]
    faults = [
        f"engine.deepspeed.{key}: {option} decides it; leave it out"
        for key, option in _DEEPSPEED_BY_OPTION.items()
        if key in entries
    ]
    if "gradient_allreduce_op" in entries:
        faults.append("engine.deepspeed.gradient_allreduce_op: the loss is normalised for the mean; leave it out")
    zero = entries.get("zero_optimization")
    if isinstance(zero, dict) and "stage" in zero:
        faults.append("engine.deepspeed.zero_optimization.stage: engine=zero1, zero2 or zero3 decides it; leave it out")
    if "data_types" in entries and options.engine.name.zero_stage == 1:
        faults.append(
            "engine.deepspeed.data_types: ZeRO-1 then uses an optimizer whose state cannot be resumed; use engine=zero2"
        )
    return faults


def accelerate_faults(options: Options, environment: Mapping[str, str]) -> list[str]:
    """What `accelerate launch` was told by its flags or its file, and the options do not say."""
    prefix = "ACCELERATE_"
    told = {name.removeprefix(prefix): value.lower() for name, value in environment.items() if name.startswith(prefix)}
    engine, stage, precision = options.engine.name, options.engine.name.zero_stage, options.run.precision
    clipping = told.get("GRADIENT_CLIPPING", "none")
    offloads = {told.get(f"DEEPSPEED_OFFLOAD_{kind}_DEVICE", "none") for kind in ("OPTIMIZER", "PARAM")} - {"none"}
    rules = {
        "--use_fsdp: there is no FSDP engine; use engine=zero3, which shards the weights too": (
            told.get("USE_FSDP") == "true"
        ),
        "--use_megatron_lm: it is not supported; use engine=zero3": told.get("USE_MEGATRON_LM") == "true",
        "--use_parallelism_config: it is not supported; use engine=zero3": (
            told.get("USE_PARALLELISM_CONFIG") == "true"
        ),
        f"--use_deepspeed: engine={engine} does not use DeepSpeed; choose engine=zero2, or leave the flag out "
        "(--multi_gpu starts several processes, on a CPU too)": told.get("USE_DEEPSPEED") == "true" and not stage,
        f"--zero_stage {told.get('DEEPSPEED_ZERO_STAGE')}: engine={engine} is stage {stage}; make them the same": (
            stage > 0 and told.get("DEEPSPEED_ZERO_STAGE", str(stage)) != str(stage)
        ),
        f"offload to {', '.join(sorted(offloads))}: engine={engine} does not offload; choose engine=zero2_offload or "
        "zero3_offload": bool(offloads) and not engine.offloads,
        "--deepspeed_config_file: it is not read; put its entries into engine.deepspeed": (
            "DEEPSPEED_CONFIG_FILE" in told
        ),
        f"--mixed_precision {told.get('MIXED_PRECISION')}: run.precision is {precision}; choose run.precision=bf16 or "
        "fp32, and leave the flag out": told.get("MIXED_PRECISION", "no") not in ("no", precision),
        f"--gradient_accumulation_steps {told.get('GRADIENT_ACCUMULATION_STEPS')}: run.packs_per_step decides it; "
        "leave the flag out": told.get("GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "none", "auto"),
        f"--gradient_clipping {clipping}: optim.max_grad_norm is {options.optim.max_grad_norm}; make them the same": (
            clipping not in ("none", "auto") and float(clipping) != options.optim.max_grad_norm
        ),
        f"--dynamo_backend {told.get('DYNAMO_BACKEND')}: it is not read; leave the flag out, and set "
        "run.compile=true": (told.get("DYNAMO_BACKEND", "no") != "no"),
        "several processes were asked for, and one was started; add --multi_gpu (on a CPU too), or --use_deepspeed "
        "with a zero engine": bool(told) and "MASTER_PORT" in environment and "WORLD_SIZE" not in environment,
    }
    return [f"accelerate launch: {fault}" for fault, applies in rules.items() if applies]


_LIGER = "0.8.2"
"""First version of Liger whose gradients are right for losses that are weighted token by token."""


def liger_faults(options: Options) -> list[str]:
    if not options.run.liger_loss:
        return []
    if not torch.cuda.is_available():
        return ["run.liger_loss: Liger's kernel needs CUDA, which torch does not see here; leave the option out"]
    try:
        found = version("liger-kernel")
    except PackageNotFoundError:
        return [f"run.liger_loss: liger-kernel is not installed; pip install 'liger-kernel>={_LIGER}'"]
    if Version(found) < Version(_LIGER):
        return [
            f"run.liger_loss: liger-kernel {found} gives wrong gradients; pip install 'liger-kernel>={_LIGER}', or "
            "leave the option out"
        ]
    return []


_PACKAGES = {
    "wandb": {"wandb": "wandb"},
    "tensorboard": {"tensorboard": "tensorboard"},
    "mlflow": {"mlflow": "mlflow-skinny", "sqlalchemy": "sqlalchemy", "alembic": "alembic"},
}
"""The modules that each tracker needs, and the packages that have them."""


def tracker_faults(options: Options) -> list[str]:
    faults = []
    for tracker, packages in _PACKAGES.items():
        if getattr(options.tracker, tracker) and any(find_spec(module) is None for module in packages):
            needed = " ".join(packages.values())
            faults.append(f"tracker={tracker} needs packages that are not installed; pip install {needed}")
    return faults
