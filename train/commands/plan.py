"""Say what a run will take: GPU memory by part, host memory, disk, steps, hours; and what fits."""

import argparse
from typing import Any

from train.commands.options import options_of
from train.config import Options
from train.errors import OmniTuneError

_ASSUMED = 0.3
"""Share of the GPUs' peak that is assumed to be used."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("options", nargs="*", help="options as in training; a folder with a config.json will do")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the work")
    parser.add_argument("--gpu-memory", type=float, help="GB of a GPU, for the table; default: several sizes")
    parser.add_argument("--mfu", type=float, help="share of the peak that was measured, 0 to 1; default: 0.3, assumed")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="peak of a GPU in bf16; default: an H200's")
    parser.add_argument(
        "--table", action="store_true", help="what other engines, checkpointing, adapters and limits would take"
    )
    parser.add_argument("--measure", action="store_true", help="run three steps here in place of computing")


def run(chosen: argparse.Namespace) -> None:
    """Print the plan."""
    if chosen.gpus < 1:
        raise OmniTuneError(f"--gpus is {chosen.gpus}; it must be at least 1")
    if chosen.mfu is not None and not 0 < chosen.mfu <= 1:
        raise OmniTuneError(f"--mfu is {chosen.mfu}; it must be above 0, and at most 1")
    predicting = chosen.table or chosen.gpu_memory or chosen.mfu or chosen.gpus > 1
    if chosen.measure and predicting:
        raise OmniTuneError(
            "--measure runs the steps here, so --gpus, --gpu-memory, --mfu and --table have no meaning beside it; "
            "leave them out (`torchrun --nproc-per-node 8 .venv/bin/omnitune plan --measure ...` takes 8 GPUs)"
        )
    if not chosen.peak_tflops > 0:
        raise OmniTuneError(f"--peak-tflops is {chosen.peak_tflops}; it must be above 0")
    options, resolved = options_of(chosen.options)

    from train.engine.accelerator import quieten

    quieten()
    if chosen.measure:
        _measure(options, resolved)
    else:
        _predict(options, chosen)


def _measure(options: Options, resolved: dict[str, Any]) -> None:
    from train.engine.accelerator import world_size
    from train.preflight.expected import Expectation
    from train.preflight.measured import as_text, measure_run
    from train.preflight.plan import work_text

    expectation = Expectation(options)
    with expectation.explained():
        taken = measure_run(options, resolved, expectation)
    if taken:
        print(as_text(taken, options, world_size()))
        print(work_text(taken.work))


def _predict(options: Options, chosen: argparse.Namespace) -> None:
    from train.checks.check import check_reading
    from train.engine.build_model import check_family
    from train.preflight.fitting import SIZES, choices, table_text
    from train.preflight.memory import measure_step
    from train.preflight.plan import as_text, gpu_memory, heaviest_batch, work_of
    from train.preflight.prepare import prepare

    check_reading(options)
    prepared = prepare(options)
    check_family(options, prepared.family)
    plan, records = prepared.plan(), prepared.sets["data.train"]
    measured = measure_step(options, prepared.family, prepared.folder, heaviest_batch(plan, records))
    memory = gpu_memory(options, measured, chosen.gpus)
    mfu = _ASSUMED if chosen.mfu is None else chosen.mfu
    source = "assumed" if chosen.mfu is None else "given"
    work = work_of(plan, flops_per_s=mfu * chosen.gpus * chosen.peak_tflops * 1e12, mfu=mfu, source=source)
    print(as_text(options, measured, memory, work, chosen.gpus))
    if chosen.table:
        sizes = (chosen.gpu_memory,) if chosen.gpu_memory else SIZES
        found = choices(options, prepared.family, prepared.folder, plan, records, chosen.gpus)
        print(table_text(options, found, sizes))
