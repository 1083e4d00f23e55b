"""A run's certificate: each promise, looked at on the user's own records, model and options."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from train.certificate.exported import EXPORT, TRANSFORMERS, VLLM, export_lines
from train.certificate.gradients import MICRO_BATCHES, PACKED, gradient_lines
from train.certificate.lines import Line, failed, skipped, write
from train.certificate.resumed import FROZEN, RESUMED, resume_lines
from train.config import Options
from train.data.record_set import BadNote
from train.errors import OmniTuneError
from train.export.checkpoint_reader import complete_checkpoints, read_state
from train.families.registry import find
from train.run_folder import RunFolder
from train.sources import load_processor, open_records


def certify(options: Options, run: RunFolder, vllm_python: Path | None = None) -> list[Line]:
    """The lines of a run's certificate, which is written to its folder too.

    options: of the run. vllm_python: interpreter of an environment with vLLM; None = this one, where it has it.
    """
    base = Path(options.model.path) if options.model.path else run.initial_model
    records = open_records(options, options.data.eval or options.data.train, load_processor(options, find(base), base))
    checkpoints = complete_checkpoints(run.checkpoints)
    newest = checkpoints[-1] if checkpoints else None
    if newest:
        records.leave_out(BadNote(**note) for note in read_state(newest)["quarantine"])
    with TemporaryDirectory(dir=run.path, prefix=".certify-") as aside:
        folder = Path(aside)
        lines = [
            *_lines((PACKED, MICRO_BATCHES), lambda: gradient_lines(options, base, newest, folder / "gradients")),
            *_lines((RESUMED, FROZEN), lambda: resume_lines(options, base, folder)),
            *_lines((EXPORT, TRANSFORMERS, VLLM), lambda: export_lines(options, base, run, records, vllm_python)),
        ]
    about = {
        "step": read_state(newest)["step"] if newest else None,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    write(run.certificate, lines, about)
    return lines


def _lines(names: tuple[str, ...], look: Callable[[], list[Line]]) -> list[Line]:
    """The lines; skipped where the memory does not hold what they take, failed with what went wrong."""
    try:
        return look()
    except torch.OutOfMemoryError:
        return [skipped(name, "the GPU's memory is too small for it") for name in names]
    except OmniTuneError as error:
        return [failed(name, " ".join(str(error).split())) for name in names]
