"""Options into data: records, their lengths, the evaluator of those held out."""

import logging
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from train.config import Options, SourceOptions
from train.data.lengths import LengthCache, digest
from train.data.plan import Limits
from train.data.record_set import Measured, RecordSet, SourceSpec
from train.engine.agreement import check_records
from train.engine.evaluator import Evaluator
from train.engine.quarantine import Quarantine
from train.families import Family

log = logging.getLogger(__name__)


def source_specs(sources: list[SourceOptions]) -> list[SourceSpec]:
    """The sources with their media folders and names filled in; a name that is taken gets a number."""
    specs: list[SourceSpec] = []
    for source in sources:
        name = first = source.name or Path(source.path).stem
        taken = {spec.name for spec in specs}
        for number in count(2):
            if name not in taken:
                break
            name = f"{first}-{number}"
        root = source.root or str(Path(source.path).parent)
        specs.append(SourceSpec(name=name, path=source.path, root=root, weight=source.weight, format=source.format))
    return specs


def load_processor(options: Options, family: Family, folder: Path) -> Any:
    """The processor of a model folder, set as the data options say."""
    processor = family.load_processor(folder)
    processor.long_audio = str(options.data.long_audio)
    if options.data.system_prompt is not None:
        processor.system_prompt = options.data.system_prompt
    return processor


def open_records(options: Options, sources: list[SourceOptions], processor: Any) -> RecordSet:
    """The records of the sources, bounded as the data options say."""
    specs = source_specs(sources)
    return RecordSet(specs, processor, max_tokens=options.data.max_tokens, too_long=str(options.data.too_long))


def read_data(
    options: Options, base: Path, processor: Any, folder: Path, accelerator: Accelerator
) -> tuple[RecordSet, Measured, RecordSet | None, Measured | None, Quarantine]:
    """The records of training and the held-out ones, if any, with their lengths; and what cannot be used of them."""
    train_set = open_records(options, options.data.train, processor)
    eval_set = open_records(options, options.data.eval, processor) if options.data.eval else None
    quarantine = Quarantine(
        folder / "quarantine.jsonl" if accelerator.is_main_process else None,
        total_records=len(train_set) + (len(eval_set) if eval_set else 0),
        max_fraction=options.data.max_bad_fraction,
    )
    cache = _length_cache(options, base)
    # The others then find the lengths in the cache: of the run, or of their own machine.
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        measured, bad = train_set.measure(cache)
        eval_measured = None
        if eval_set:
            eval_measured, bad_eval = eval_set.measure(cache)
            bad += bad_eval
    check_records(measured, "data.train", accelerator)
    if eval_measured:
        check_records(eval_measured, "data.eval", accelerator)
    quarantine.add(bad)
    if bad and accelerator.is_main_process:
        log.warning("%d records cannot be used; quarantine.jsonl says why", len(bad))
    return train_set, measured, eval_set, eval_measured, quarantine


def _length_cache(options: Options, base: Path) -> LengthCache | None:
    if options.data.cache is None:
        return None
    data = options.data
    # A pipe would be waited for.
    files = sorted(file for file in base.iterdir() if file.suffix in (".json", ".jinja", ".model") and file.is_file())
    settings = [digest(files), data.max_tokens, data.too_long, data.long_audio, data.system_prompt]
    return LengthCache(Path(options.data.cache).expanduser() / "lengths", settings)


def limits_of(options: Options) -> Limits:
    """What a pack may hold."""
    return Limits(options.data.max_tokens, options.data.max_patches, options.data.max_frames)


def make_evaluator(options: Options, accelerator: Accelerator, records: RecordSet, measured: Measured) -> Evaluator:
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
    )
