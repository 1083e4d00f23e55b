"""What each number may be, and rules between the options of evaluation."""

from operator import attrgetter
from pathlib import Path

from train.config import METRICS, PARTS, Options

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


def number_faults(options: Options) -> list[str]:
    run, betas = options.run, options.optim.betas
    faults = [
        fault for name, limits in RANGES.items() for fault in range_fault(name, attrgetter(name)(options), limits)
    ]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        faults.append(f"optim.betas is {list(betas)}; it takes two numbers from 0 to below 1")
    if (best := options.checkpoint.keep_best) and not options.data.eval:
        faults.append(f"checkpoint.keep_best is {best}, but data.eval is empty, so nothing is evaluated")
    faults += _gain_faults(options)
    if run.resume not in ("auto", "never") and not Path(run.resume).is_dir():
        faults.append(f"run.resume: there is no checkpoint folder '{run.resume}'; use auto, never or a folder")
    return faults


def range_fault(name: str, value: float | None, limits: tuple[float, float]) -> list[str]:
    if value is None or limits[0] <= value <= limits[1]:  # which what is no number (nan) is not
        return []
    return [f"{name} is {value}; it must lie between {limits[0]} and {limits[1]}"]


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


def metric_faults(options: Options) -> list[str]:
    return [
        f"eval.metrics: there is no metric '{entry}'; choose from {', '.join(METRICS)}, or <metric>/<type of records>"
        for entry in options.eval.metrics
        if entry.partition("/")[0] not in METRICS
    ]
