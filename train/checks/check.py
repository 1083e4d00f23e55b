"""All faults of the options together, found before anything is loaded."""

from collections.abc import Mapping

from train.checks.data import data_faults, model_faults, source_faults
from train.checks.launch import accelerate_faults, deepspeed_faults, launch_faults, liger_faults, tracker_faults
from train.checks.numbers import metric_faults, number_faults
from train.checks.tuning import layer_faults, lora_faults, tuning_faults
from train.config import Options
from train.errors import ConfigError


def check(options: Options, world_size: int = 1, environment: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError with every fault in the options.

    world_size: how many processes were launched.
    environment: variables of this process, by which `accelerate launch` hands on what it was told.
    """
    faults = [
        *model_faults(options),
        *data_faults(options),
        *tuning_faults(options),
        *lora_faults(options),
        *number_faults(options),
        *metric_faults(options),
        *launch_faults(options, world_size),
        *deepspeed_faults(options),
        *accelerate_faults(options, environment or {}),
        *liger_faults(options),
        *layer_faults(options),
        *tracker_faults(options),
    ]
    if faults:
        raise ConfigError(faults)


def check_reading(options: Options) -> None:
    """Raise ConfigError with every fault in the options that reading the records reads; no weights are asked for."""
    faults = [*model_faults(options, weights=False), *data_faults(options), *number_faults(options)]
    if faults:
        raise ConfigError(faults)


def check_evaluation(options: Options) -> None:
    """Raise ConfigError with every fault in the options that evaluating a model folder reads."""
    faults = [*source_faults(options, "eval"), *number_faults(options), *metric_faults(options)]
    if not options.data.eval:
        faults.append("data.eval is empty: name a file of records, or data=sample")
    if faults:
        raise ConfigError(faults)
