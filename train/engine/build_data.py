"""Options into data: records, their lengths, the evaluator of those held out."""

import logging
from pathlib import Path

from accelerate import Accelerator

from train.checks import tuned_modules
from train.config import Options
from train.data.lengths import LengthCache, digest
from train.data.loader import StepPlan
from train.data.plan import Limits
from train.data.record_set import Measured, RecordSet
from train.engine.evaluator import Evaluator
from train.engine.measuring import measure_alike
from train.engine.quarantine import Quarantine
from train.engine.stop import StopRequest
from train.families.family import Family
from train.modules.flops import Flops
from train.run_folder import RunFolder
from train.schema import Processor
from train.sources import open_records

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


def length_cache(options: Options, base: Path, kind: str = "lengths") -> LengthCache | None:
    """Where lengths by the processor of a model folder are kept; None where the options, or the machine, have no place.

    base: the model folder. kind: what is kept, by the name of its folder.
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
    settings = [digest(files), data.max_tokens, data.too_long, data.long_audio, data.image_places, data.system_prompt]
    return LengthCache(folder / kind, settings)


def limits_of(options: Options) -> Limits:
    """What a pack may hold."""
    return Limits(options.data.max_tokens, {"image": options.data.max_patches, "audio": options.data.max_frames})


def flops_of(options: Options, family: Family, base: Path) -> Flops:
    """The floating-point operations of what the options train; base: a model folder, whose configuration is read."""
    return family.flops(family.skeleton(base), tuned_modules(options), options.lora.modules)


def make_plan(options: Options, flops: Flops, records: RecordSet, measured: Measured) -> StepPlan:
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
