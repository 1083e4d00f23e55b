"""Options into data: records, their lengths, the evaluator of those held out."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from train.checks.chosen import tuned_modules
from train.config import Options
from train.data.lengths import LengthCache, digest
from train.data.loader import StepPlan
from train.data.plan import Limits, Speeds
from train.data.record_set import Measured, RecordSet
from train.engine.evaluator import Evaluator
from train.engine.measuring import measure_alike
from train.engine.quarantine import Quarantine
from train.engine.stop import StopRequest
from train.families.family import Family
from train.modules.flops import Flops
from train.run_folder import RunFolder
from train.schema import Processor
from train.sources import augmentations, open_records

log = logging.getLogger(__name__)

_SAMPLE = Path("data/sample")
"""Where the data of `data=sample` lie."""


def read_data(
    options: Options, base: Path, processor: Processor, folder: RunFolder, accelerator: Accelerator
) -> tuple[RecordSet, Measured, RecordSet | None, Measured | None, Quarantine]:
    """The records of training and the held-out ones, if any, with their lengths; and what cannot be used of them."""
    train_set = open_records(options, options.data.train, processor)
    eval_set = open_records(options, options.data.eval, processor) if options.data.eval else None
    data = options.data
    shipped = [all(Path(source.path).parent == _SAMPLE for source in part) for part in (data.train, data.eval)]
    if data.eval and shipped == [False, True] and accelerator.is_main_process:
        log.warning("data.eval is the shipped sample, and data.train is not; name held-out files, or set data.eval=[]")
    held_out = len(eval_set) if eval_set else 0
    quarantine = Quarantine(
        folder.quarantine if accelerator.is_main_process else None,
        total_records=len(train_set) + held_out,
        max_fraction=options.data.max_bad_fraction,
        held_out=held_out,
        held_out_files=[source.path for source in options.data.eval],
    )
    sets = {"data.train": train_set} | ({"data.eval": eval_set} if eval_set else {})
    found = measure_alike(sets, length_cache(options, base), accelerator)
    bad = [note for _, notes in found.values() for note in notes]
    quarantine.add(bad)
    if bad and accelerator.is_main_process:
        others = f"; '{folder.quarantine}' names the others" if len(bad) > 1 else ""
        log.warning("%s: %s%s", quarantine.summary(), bad[0].reason, others)
    return train_set, found["data.train"][0], eval_set, found["data.eval"][0] if eval_set else None, quarantine


def read_speeds(
    options: Options,
    base: Path,
    records: RecordSet,
    measured: Measured,
    measure: Callable[[Mapping[str, RecordSet], LengthCache | None], Mapping[str, tuple[Measured, Any]]],
) -> Speeds | None:
    """The lengths of the records of training at each speed that is drawn; None where all run at their own.

    measure: what measures record sets, by the name that a progress bar shows.
    """
    drawn = [settings.speed if settings else () for settings in augmentations(options)]
    factors = [1.0, *sorted({float(speed) for of_source in drawn for speed in of_source} - {1.0})]
    if len(factors) == 1:
        return None
    lengths = [measured.lengths]
    for speed in factors[1:]:
        what = f"data.train at speed {speed:g}"
        at_speed = open_records(options, options.data.train, records.processor, speed=speed)
        found, _ = measure({what: at_speed}, length_cache(options, base, speed=speed))[what]
        lengths.append(np.where(measured.lengths[:, :1] > 0, found.lengths, 0))
    choices = [[factors.index(float(speed)) for speed in of_source] or [0] for of_source in drawn]
    drawn_from = list(zip(measured.ends.tolist(), choices, strict=True))
    return Speeds(factors, np.stack(lengths), drawn_from, options.run.seed)


def length_cache(options: Options, base: Path, kind: str = "lengths", *, speed: float = 1.0) -> LengthCache | None:
    """Where lengths by the processor of a model folder are kept; None where the options, or the machine, have no place.

    base: the model folder. kind: what is kept, by the name of its folder. speed: of the clips that are measured.
    """
    data = options.data
    if data.cache is None:
        return None
    try:
        folder = Path(data.cache).expanduser()
    except RuntimeError as error:
        log.warning("data.cache: '%s' has no place (%s), so every start measures lengths again", data.cache, error)
        return None
    # A pipe would be waited for.
    files = sorted(file for file in base.iterdir() if file.suffix in (".json", ".jinja", ".model") and file.is_file())
    settings: list[Any] = [digest(files), data.max_tokens, data.too_long, data.long_audio, data.system_prompt]
    settings += [] if speed == 1 else [speed]
    settings += [] if data.image_places is None else [f"{data.image_places} places"]
    return LengthCache(folder / kind, settings)


def limits_of(options: Options) -> Limits:
    """What a pack may hold."""
    return Limits(options.data.max_tokens, {"image": options.data.max_patches, "audio": options.data.max_frames})


def flops_of(options: Options, family: Family, base: Path) -> Flops:
    """The floating-point operations of what the options train; base: a model folder, whose configuration is read."""
    return family.flops(family.skeleton(base), tuned_modules(options), options.lora.modules)


def make_plan(
    options: Options, flops: Flops, records: RecordSet, measured: Measured, speeds: Speeds | None = None
) -> StepPlan:
    """The steps of a run over these records."""
    return StepPlan(
        measured,
        [spec.weight for spec in records.specs],
        limits_of(options),
        packs_per_step=options.run.packs_per_step,
        seed=options.run.seed,
        epochs=options.run.epochs,
        max_steps=options.run.max_steps,
        costs=flops.of(measured.lengths),
        speeds=speeds,
    )


def make_evaluator(
    options: Options,
    accelerator: Accelerator,
    records: RecordSet,
    measured: Measured,
    stop: StopRequest | None = None,
) -> Evaluator:
    """The evaluator of held-out records, as the options under `eval` say."""
    return Evaluator(
        accelerator,
        records,
        measured,
        limits_of(options),
        max_records=options.eval.max_records,
        generate=options.eval.generate,
        metrics=options.eval.metrics,
        max_new_tokens=options.eval.max_new_tokens,
        batch_size=options.eval.batch_size,
        stop=stop,
    )
