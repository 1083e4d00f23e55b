"""Say what a run will take: GPU memory by part, host memory, disk, steps, hours; and what fits."""

import argparse

from train.commands.options import options_of
from train.errors import OmniTuneError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("options", nargs="*", help="options as in training; a folder with a config.json will do")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the work")
    parser.add_argument("--gpu-memory", type=float, help="GB of a GPU, for the table; default: several sizes")
    parser.add_argument("--mfu", type=float, help="share of the peak that was measured, 0 to 1; default: 0.3, assumed")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="peak of a GPU in bf16; default: an H200's")
    parser.add_argument(
        "--table", action="store_true", help="what other engines, checkpointing and adapters would take"
    )


def run(chosen: argparse.Namespace) -> None:
    """Print the plan."""
    if chosen.gpus < 1:
        raise OmniTuneError(f"--gpus is {chosen.gpus}; it must be at least 1")
    if chosen.mfu is not None and not 0 < chosen.mfu <= 1:
        raise OmniTuneError(f"--mfu is {chosen.mfu}; it must be above 0, and at most 1")
    if not chosen.peak_tflops > 0:
        raise OmniTuneError(f"--peak-tflops is {chosen.peak_tflops}; it must be above 0")
    options, _ = options_of(chosen.options)

    from train.checks import check_reading
    from train.engine.accelerator import quieten
    from train.engine.build import check_family
    from train.preflight.plan import SIZES, as_text, choices, gpu_memory, plan_run, table_text, work_of
    from train.preflight.prepare import prepare

    quieten()
    check_reading(options)
    prepared = prepare(options)
    check_family(options, prepared.family)
    plan, batch, measured = plan_run(prepared)
    memory = gpu_memory(options, measured, chosen.gpus)
    work = work_of(plan, gpus=chosen.gpus, peak_tflops=chosen.peak_tflops, mfu=chosen.mfu)
    print(as_text(prepared, measured, memory, work, chosen.gpus))
    if chosen.table:
        sizes = (chosen.gpu_memory,) if chosen.gpu_memory else SIZES
        print(table_text(choices(prepared, batch, chosen.gpus), sizes))
