"""Measure a model folder on held-out records."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import OmniTuneError
from train.run_folder import model_in

if TYPE_CHECKING:
    from train.config import Options
    from train.data.record_set import BadNote

_NAMED = 20
"""Most bad records that are named."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("model", type=Path, help="folder of a run, whose export/ is taken, or of a model")
    parser.add_argument(
        "data", nargs="+", help="files of records, or options as in training: data=sample, eval.metrics=[wer/speech]"
    )
    parser.add_argument("--root", type=Path, help="folder of the files' media; default: each file's own")
    parser.add_argument("--max-records", type=int, default=0, help="records at most, spread evenly; 0 = all")
    parser.add_argument("--batch-size", type=int, default=32, help="answers generated at a time, per process")
    parser.add_argument("--max-new-tokens", type=int, help="tokens of an answer at most; default: as in training")
    parser.add_argument("--predictions", type=Path, help="write the answers beside their references here (JSON lines)")


def run(chosen: argparse.Namespace) -> None:
    """Print a table of the types of records; under torchrun its processes share the work."""
    folder, options = model_in(chosen.model), _options(chosen)

    from train.checks.check import check_evaluation
    from train.engine.accelerator import close, make_accelerator
    from train.engine.build_data import length_cache, make_evaluator
    from train.engine.measuring import measure_alike
    from train.families.registry import find
    from train.inference.predictions import write_predictions
    from train.sources import load_processor, open_records

    check_evaluation(options)
    family = find(folder)
    accelerator = make_accelerator(options)
    records = open_records(options, options.data.eval, load_processor(options, family, folder))
    measured, bad = measure_alike({"data.eval": records}, length_cache(options, folder), accelerator)["data.eval"]
    if len(bad) == len(records):
        raise OmniTuneError(f"none of the {len(records)} records can be used; the first: {bad[0].reason}")
    evaluator = make_evaluator(options, accelerator, records, measured)
    model = family.load_model(folder).to(accelerator.device)
    evaluation = evaluator.evaluate(model)
    assert evaluation  # nothing asks it to stop
    if accelerator.is_main_process:
        _name([*bad, *evaluation.bad])
        if chosen.predictions:
            write_predictions(chosen.predictions, evaluation.predictions)
        print(evaluation.table())
    close(accelerator)


def _options(chosen: argparse.Namespace) -> "Options":
    """What the words say: those with "=" are options, the others files of records."""
    from train.commands.options import options_of
    from train.config import METRICS, SourceOptions

    overrides = [word for word in chosen.data if "=" in word and not Path(word).is_file()]
    group = [] if any(word.startswith("data=") for word in overrides) else ["data=files"]
    defaults = [
        "run.precision=fp32",  # no autocast: the model computes in the dtype that it is stored in
        "run.threads=0",
        f"eval.metrics=[{','.join(METRICS)}]",
        f"eval.max_records={chosen.max_records}",
        f"eval.batch_size={chosen.batch_size}",
    ]
    if chosen.max_new_tokens is not None:
        defaults.append(f"eval.max_new_tokens={chosen.max_new_tokens}")
    options, _ = options_of([*group, *defaults, *overrides])
    files = [word for word in chosen.data if word not in overrides]
    if files:
        root = str(chosen.root) if chosen.root else None
        options.data.eval = [SourceOptions(path=file, root=root) for file in files]
    return options


def _name(bad: "list[BadNote]") -> None:
    """Say which records could not be used."""
    reasons = list({(note.source, note.line): note.reason for note in bad}.values())
    for reason in reasons[:_NAMED]:
        print(f"left out: {reason}", file=sys.stderr)
    if len(reasons) > _NAMED:
        print(f"left out: {len(reasons) - _NAMED} more", file=sys.stderr)
