"""Rules between options. All faults are found before anything is loaded, and reported together."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

import torch
from packaging.version import Version

from train.config import (
    FILE_FORMATS,
    METRICS,
    PARTS,
    AugmentOptions,
    Engine,
    LoraOptions,
    OptimizerName,
    Options,
    Precision,
)
from train.errors import ConfigError


def tuned_modules(options: Options) -> list[str]:
    """The modules whose `modules.tune_<name>` flag is on, in the order of PARTS."""
    return [name for name in PARTS if getattr(options.modules, f"tune_{name}")]


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


_COUNT = 10**9
_RATE = (0, 10)

RANGES: dict[str, tuple[float, float]] = {
    "data.max_tokens": (16, 10**7),
    "data.max_patches": (1, _COUNT),
    "data.max_frames": (1, _COUNT),
    "data.image_places": (1, 10**5),
    "data.max_bad_fraction": (0, 1),
    "data.workers": (0, 256),
    "data.prefetch": (1, 1000),
    "data.decode_limit_s": (0.001, 86400),
    **{f"modules.lr.{name}": _RATE for name in PARTS},
    "lora.rank": (1, 1024),
    "lora.alpha": (0.001, 10**5),
    "lora.dropout": (0, 1),
    "lora.lr": _RATE,
    "optim.warmup_ratio": (0, 1),
    "optim.min_lr_ratio": (0, 1),
    "optim.eps": (1e-20, 1),
    "optim.weight_decay": (0, 100),
    "optim.max_grad_norm": (0, 10**6),
    "run.seed": (0, 2**32 - 1),
    "run.epochs": (1, 10**5),
    "run.max_steps": (1, _COUNT),
    "run.packs_per_step": (1, 10**5),
    "checkpoint.save_every": (0, _COUNT),
    "checkpoint.keep_last": (0, _COUNT),
    "eval.every": (0, _COUNT),
    "run.max_not_finite": (0, _COUNT),
    "run.stop_after_no_gain": (0, _COUNT),
    "run.peak_tflops": (0.001, 10**6),
    "run.threads": (0, 512),
    "eval.max_records": (0, _COUNT),
    "eval.max_new_tokens": (1, 10**6),
    "eval.batch_size": (1, 10**4),
    "debug.profile_steps": (0, 1000),
}
"""Least and most of each option that is a number."""


_LIGER = "0.8.2"
"""First version of Liger whose gradients are right for losses that are weighted token by token."""


def check(options: Options, world_size: int = 1, environment: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError with every fault in the options.

    world_size: how many processes were launched.
    environment: variables of this process, by which `accelerate launch` hands on what it was told.
    """
    faults = [
        *_model_faults(options),
        *_data_faults(options),
        *_tuning_faults(options),
        *_lora_faults(options),
        *_number_faults(options),
        *_metric_faults(options),
        *_launch_faults(options, world_size),
        *_deepspeed_faults(options),
        *_accelerate_faults(options, environment or {}),
        *_liger_faults(options),
        *_layer_faults(options),
        *_tracker_faults(options),
    ]
    if faults:
        raise ConfigError(faults)


def check_reading(options: Options) -> None:
    """Raise ConfigError with every fault in the options that reading the records reads; no weights are asked for."""
    faults = [*_model_faults(options, weights=False), *_data_faults(options), *_number_faults(options)]
    if faults:
        raise ConfigError(faults)


def check_evaluation(options: Options) -> None:
    """Raise ConfigError with every fault in the options that evaluating a model folder reads."""
    faults = [*_source_faults(options, "eval"), *_number_faults(options), *_metric_faults(options)]
    if not options.data.eval:
        faults.append("data.eval is empty: name a file of records, or data=sample")
    if faults:
        raise ConfigError(faults)


def _model_faults(options: Options, *, weights: bool = True) -> list[str]:
    name, path = model_folder(options)
    if not path:
        return ["model.path is not set: name the folder of the model, model.path=/path/to/model"]
    folder = Path(path)
    if not folder.is_dir():
        return [f"{name}: there is no folder '{path}'"]
    if not (folder / "config.json").is_file():
        return [f"{name}: '{path}' has no config.json, so it is not a model folder"]
    if weights and options.model.path and not any(folder.glob("*.safetensors")):
        return [
            f"model.path: '{path}' has no weights (*.safetensors); "
            f"download them, or start from nothing with model.path=null model.random_from={path}"
        ]
    return []


def model_folder(options: Options) -> tuple[str, str]:
    """The option that names the model folder, and the folder ("" where neither does)."""
    if options.model.path:
        return "model.path", options.model.path
    return "model.random_from", options.model.random_from or ""


def _data_faults(options: Options) -> list[str]:
    faults = []
    if not options.data.train:
        faults.append("data.train is empty: name a file of records, data.train=records.jsonl")
    return faults + _source_faults(options, "train") + _source_faults(options, "eval")


_AUGMENT_PAIRS: dict[str, tuple[float, float]] = {
    "noise_db": (-30, 100),
    "echo_s": (0.01, 10),
    "gain_db": (-60, 60),
    "jpeg": (1, 95),
}
"""Least and most of each range of random changes."""


def _augment_faults(where: str, augment: AugmentOptions) -> list[str]:
    faults = [
        f"{where}.{name} is {list(given)}; it is the least and the greatest value, two numbers from {low:g} to {high:g}"
        for name, (low, high) in _AUGMENT_PAIRS.items()
        if (given := getattr(augment, name)) and not (len(given) == 2 and low <= given[0] <= given[1] <= high)
    ]
    faults += [
        f"{where}.speed has {factor:g}; use factors from 0.5 to 2, with at most two decimals"
        for factor in augment.speed
        if not 0.5 <= factor <= 2 or round(factor, 2) != factor
    ]
    for name, most in (("share", 1), ("color", 1), ("freq_mask", 128), ("time_mask", 3000), ("masks", 100)):
        faults += _range_fault(f"{where}.{name}", getattr(augment, name), (0, most))
    for name in ("noise_folder", "echo_folder"):
        folder = getattr(augment, name)
        if folder is not None and not Path(folder).is_dir():
            faults.append(f"{where}.{name}: there is no folder '{folder}'")
    if augment.noise_folder and not augment.noise_db:
        faults.append(f"{where}.noise_folder changes nothing without noise_db; set {where}.noise_db=[0,20]")
    if augment.echo_folder and augment.echo_s:
        faults.append(f"{where}: echo_folder and echo_s are two ways to make echo; set one of them")
    return faults


def _source_faults(options: Options, group: str) -> list[str]:
    faults = _augment_faults("data.augment", options.data.augment) if group == "train" else []
    for index, source in enumerate(getattr(options.data, group)):
        where = f"data.{group}[{index}]"
        if not Path(source.path).is_file():
            faults.append(f"{where}.path: there is no file '{source.path}'")
        if source.root is not None and not Path(source.root).is_dir():
            faults.append(f"{where}.root: there is no folder '{source.root}'")
        faults += _range_fault(f"{where}.weight", source.weight, (1e-6, 1000))
        if source.augment is not None and group == "eval":
            faults.append(f"{where}.augment: held-out data are never changed; leave it out")
        elif source.augment is not None:
            faults += _augment_faults(f"{where}.augment", source.augment)
        if source.format not in FILE_FORMATS:
            faults.append(f"{where}.format is '{source.format}'; use auto, jsonl, json or parquet")
    return faults


def _tuning_faults(options: Options) -> list[str]:
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


def _lora_faults(options: Options) -> list[str]:
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


def _number_faults(options: Options) -> list[str]:
    run, betas = options.run, options.optim.betas
    faults = [
        fault for name, limits in RANGES.items() for fault in _range_fault(name, attrgetter(name)(options), limits)
    ]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        faults.append(f"optim.betas is {list(betas)}; it takes two numbers from 0 to below 1")
    if (best := options.checkpoint.keep_best) and not options.data.eval:
        faults.append(f"checkpoint.keep_best is {best}, but data.eval is empty, so nothing is evaluated")
    faults += _gain_faults(options)
    if run.resume not in ("auto", "never") and not Path(run.resume).is_dir():
        faults.append(f"run.resume: there is no checkpoint folder '{run.resume}'; use auto, never or a folder")
    return faults


def _gain_faults(options: Options) -> list[str]:
    run, asked = options.run, f"run.stop_after_no_gain is {options.run.stop_after_no_gain}"
    if run.gain_figure and not run.stop_after_no_gain:
        return [f"run.gain_figure is {run.gain_figure}; set run.stop_after_no_gain too"]
    if not 1 <= run.stop_after_no_gain <= _COUNT:
        return []
    if not options.data.eval:
        return [f"{asked}, but data.eval is empty, so nothing is evaluated"]
    if not options.eval.every:
        return [f"{asked}, but eval.every is 0, so nothing is evaluated before the last step; set eval.every"]
    return []


def gain_figure(options: Options) -> str:
    """The figure of the evaluation by which a run may end early; "" where it may not."""
    if not options.run.stop_after_no_gain:
        return ""
    return options.run.gain_figure or options.checkpoint.keep_best or "eval/loss"


def _range_fault(name: str, value: float | None, limits: tuple[float, float]) -> list[str]:
    if value is None or limits[0] <= value <= limits[1]:  # which what is no number (nan) is not
        return []
    return [f"{name} is {value}; it must lie between {limits[0]} and {limits[1]}"]


def _metric_faults(options: Options) -> list[str]:
    return [
        f"eval.metrics: there is no metric '{entry}'; choose from {', '.join(METRICS)}, or <metric>/<type of records>"
        for entry in options.eval.metrics
        if entry.partition("/")[0] not in METRICS
    ]


def _launch_faults(options: Options, world_size: int) -> list[str]:
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


def _deepspeed_faults(options: Options) -> list[str]:
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


def _accelerate_faults(options: Options, environment: Mapping[str, str]) -> list[str]:
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


def _liger_faults(options: Options) -> list[str]:
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


def _tracker_faults(options: Options) -> list[str]:
    faults = []
    for tracker, packages in _PACKAGES.items():
        if getattr(options.tracker, tracker) and any(find_spec(module) is None for module in packages):
            needed = " ".join(packages.values())
            faults.append(f"tracker={tracker} needs packages that are not installed; pip install {needed}")
    return faults


def _layer_faults(options: Options) -> list[str]:
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
