"""Rules between options. All faults are found before anything is loaded, and reported together."""

from importlib.util import find_spec
from pathlib import Path

import torch

from train.config import MODULES, Engine, Options
from train.errors import ConfigError


def tuned_modules(options: Options) -> list[str]:
    """The modules whose `modules.tune_<name>` flag is on, in the order of MODULES."""
    return [name for name in MODULES if getattr(options.modules, f"tune_{name}")]


def check(options: Options, world_size: int = 1) -> None:
    """Raise ConfigError with every fault in the options.

    world_size: how many processes were launched.
    """
    faults = [
        *_model_faults(options),
        *_data_faults(options),
        *_tuning_faults(options),
        *_number_faults(options),
        *_launch_faults(options, world_size),
        *_liger_faults(options),
    ]
    if faults:
        raise ConfigError(faults)


def _model_faults(options: Options) -> list[str]:
    name, path = model_folder(options)
    if not path:
        return ["model.path is not set: name the folder of the model, model.path=/path/to/model"]
    folder = Path(path)
    if not folder.is_dir():
        return [f"{name}: there is no folder '{path}'"]
    if not (folder / "config.json").is_file():
        return [f"{name}: '{path}' has no config.json, so it is not a model folder"]
    if options.model.path and not any(folder.glob("*.safetensors")):
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
        faults.append("data.train is empty: name a source, 'data.train=[{path: records.jsonl}]'")
    for group in ("train", "eval"):
        for index, source in enumerate(getattr(options.data, group)):
            where = f"data.{group}[{index}]"
            if not Path(source.path).is_file():
                faults.append(f"{where}.path: there is no file '{source.path}'")
            if source.root is not None and not Path(source.root).is_dir():
                faults.append(f"{where}.root: there is no folder '{source.root}'")
            if not source.weight > 0:
                faults.append(f"{where}.weight is {source.weight}; it must be above 0 (leave the source out)")
            if source.format not in ("auto", "jsonl", "json", "parquet"):
                faults.append(f"{where}.format is '{source.format}'; use auto, jsonl, json or parquet")
    return faults


def _tuning_faults(options: Options) -> list[str]:
    tuned = tuned_modules(options)
    if not tuned:
        flags = ", ".join(f"modules.tune_{name}" for name in MODULES)
        return [f"nothing is tuned: set at least one of {flags} to true"]
    adapted = options.lora.modules
    faults = [
        f"lora.modules: there is no module '{name}'; choose from {', '.join(MODULES)}"
        for name in adapted
        if name not in MODULES
    ]
    if adapted and not faults and not set(adapted) & set(tuned):
        faults.append(
            f"LoRA has nothing to adapt: lora.modules is [{', '.join(adapted)}], but none of them is tuned; "
            f"set modules.tune_{adapted[0]}=true, or lora=none"
        )
    faults += [
        f"lora.targets.{name}: it is not among lora.modules, so nothing would read it"
        for name in options.lora.targets
        if name not in adapted
    ]
    faults += [
        f"modules.lr.{name} is {rate}; a module that is tuned needs a rate above 0"
        for name in tuned
        if not (rate := getattr(options.modules.lr, name)) > 0
    ]
    return faults


def _number_faults(options: Options) -> list[str]:
    data, run, optim, lora, evaluation = options.data, options.run, options.optim, options.lora, options.eval
    at_least = {
        "data.max_tokens": (data.max_tokens, 16),
        "data.max_patches": (data.max_patches, 1),
        "data.max_frames": (data.max_frames, 1),
        "data.workers": (data.workers, 0),
        "data.prefetch": (data.prefetch, 1),
        "run.seed": (run.seed, 0),
        "run.epochs": (run.epochs, 1),
        "run.max_steps": (1 if run.max_steps is None else run.max_steps, 1),
        "run.packs_per_step": (run.packs_per_step, 1),
        "run.save_every": (run.save_every, 0),
        "run.keep_last": (run.keep_last, 0),
        "run.eval_every": (run.eval_every, 0),
        "run.threads": (run.threads, 0),
        "optim.weight_decay": (optim.weight_decay, 0),
        "optim.max_grad_norm": (optim.max_grad_norm, 0),
        "lora.rank": (lora.rank, 1),
        "eval.max_records": (evaluation.max_records, 0),
        "eval.max_new_tokens": (evaluation.max_new_tokens, 1),
        "eval.batch_size": (evaluation.batch_size, 1),
        "debug.profile_steps": (options.debug.profile_steps, 0),
    }
    faults = [f"{name} is {value}; the least is {least}" for name, (value, least) in at_least.items() if value < least]
    shares = {
        "data.max_bad_fraction": data.max_bad_fraction,
        "optim.warmup_ratio": optim.warmup_ratio,
        "optim.min_lr_ratio": optim.min_lr_ratio,
        "lora.dropout": lora.dropout,
    }
    faults += [
        f"{name} is {value}; it must lie between 0 and 1" for name, value in shares.items() if not 0 <= value <= 1
    ]
    if not data.decode_limit_s > 0:
        faults.append(f"data.decode_limit_s is {data.decode_limit_s}; it must be above 0")
    if not all(0 <= beta < 1 for beta in optim.betas):
        faults.append(f"optim.betas is {list(optim.betas)}; both must lie between 0 and 1")
    if run.resume not in ("auto", "never") and not Path(run.resume).is_dir():
        faults.append(f"run.resume: there is no checkpoint folder '{run.resume}'; use auto, never or a folder")
    return faults


def _launch_faults(options: Options, world_size: int) -> list[str]:
    if options.engine.name is Engine.none and world_size > 1:
        return [f"engine=none is for one process, and {world_size} were launched; use engine=ddp or engine=zero2"]
    if options.engine.deepspeed and not options.engine.name.startswith("zero"):
        return [f"engine.deepspeed is set, but engine={options.engine.name} does not use DeepSpeed"]
    return []


def _liger_faults(options: Options) -> list[str]:
    if not options.run.liger_loss:
        return []
    if not torch.cuda.is_available():
        return ["run.liger_loss: Liger's kernel needs CUDA, which torch does not see here; leave the option out"]
    if find_spec("liger_kernel") is None:
        return ["run.liger_loss: the package liger-kernel is not installed; pip install liger-kernel, or leave it out"]
    return []
