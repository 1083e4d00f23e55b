"""Rules between the options of the model folder and the data."""

from pathlib import Path

from train.checks.chosen import model_folder
from train.checks.numbers import range_fault
from train.config import FILE_FORMATS, AugmentOptions, Options


def model_faults(options: Options, *, weights: bool = True) -> list[str]:
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
            f"download them, or start from random weights with model.path=null model.random_from={path}"
        ]
    return []


def data_faults(options: Options) -> list[str]:
    faults = []
    if not options.data.train:
        faults.append("data.train is empty: name a file of records, data.train=records.jsonl")
    return faults + source_faults(options, "train") + source_faults(options, "eval")


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
        faults += range_fault(f"{where}.{name}", getattr(augment, name), (0, most))
    for name in ("noise_folder", "echo_folder"):
        folder = getattr(augment, name)
        if folder is not None and not Path(folder).is_dir():
            faults.append(f"{where}.{name}: there is no folder '{folder}'")
    if augment.noise_folder and not augment.noise_db:
        faults.append(f"{where}.noise_folder changes nothing without noise_db; set {where}.noise_db=[0,20]")
    if augment.echo_folder and augment.echo_s:
        faults.append(f"{where}: echo_folder and echo_s are two ways to make echo; set one of them")
    return faults


def source_faults(options: Options, group: str) -> list[str]:
    faults = _augment_faults("data.augment", options.data.augment) if group == "train" else []
    for index, source in enumerate(getattr(options.data, group)):
        where = f"data.{group}[{index}]"
        if not Path(source.path).is_file():
            faults.append(f"{where}.path: there is no file '{source.path}'")
        if source.root is not None and not Path(source.root).is_dir():
            faults.append(f"{where}.root: there is no folder '{source.root}'")
        faults += range_fault(f"{where}.weight", source.weight, (1e-6, 1000))
        if source.augment is not None and group == "eval":
            faults.append(f"{where}.augment: held-out data are never changed; leave it out")
        elif source.augment is not None:
            faults += _augment_faults(f"{where}.augment", source.augment)
        if source.format not in FILE_FORMATS:
            faults.append(f"{where}.format is '{source.format}'; use auto, jsonl, json or parquet")
    return faults
