"""Options into objects, with build_data and build_model the one place that knows both."""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.integrations import unset_hf_deepspeed_config

from train.announce import announced
from train.checks.check import check
from train.checks.chosen import gain_figure, model_folder, tuned_modules
from train.config import OptimizerName, Options
from train.data.augment import Augmenter
from train.data.loader import StepLoader, StepPlan
from train.data.record_set import RecordSet
from train.engine.accelerator import make_accelerator, world_size, zero_stage
from train.engine.build_data import flops_of, make_evaluator, make_plan, read_data, read_speeds
from train.engine.build_model import check_family, compute_dtype_of, load_model
from train.engine.checkpoint import Checkpoints
from train.engine.consistency import check_folder
from train.engine.engines import DeepSpeedEngine, Engine, OwnEngine
from train.engine.environment import write_environment
from train.engine.evaluator import Evaluator
from train.engine.gain import Gain
from train.engine.lock import lock
from train.engine.measuring import measure_alike
from train.engine.observers import MetricsFile, Observer, Profiler, Progress
from train.engine.optimizer import LearningRates, matrices
from train.engine.peak import peak_flops
from train.engine.reporting import Reporter
from train.engine.state import shape_of, size_of, trained_state
from train.engine.step import TrainStep
from train.engine.stop import StopRequest
from train.engine.tracking.chosen import trackings
from train.engine.tracking.tracker import TrackedRun
from train.engine.trainer import Intervals, Trainer
from train.errors import ConfigError, OmniTuneError
from train.export.base_folder import check_files
from train.export.from_checkpoint import export_checkpoint, is_export_of
from train.export.model_folder import write_random_model
from train.families.family import Family
from train.families.registry import find
from train.modules.objectives import NextToken
from train.modules.trainable import Group, parameter_groups
from train.report.verdict import State
from train.run_folder import RunFolder
from train.schema import Batch
from train.sources import load_processor, make_augmenter
from train.wording import counted

log = logging.getLogger(__name__)


@dataclass
class Run:
    """A run that is ready to start."""

    options: Options
    accelerator: Accelerator
    trainer: Trainer
    folder: RunFolder
    base: Path
    records: RecordSet
    """By which the export is checked: held-out ones, or else those of training."""
    stop: StopRequest
    reporter: Reporter | None
    """None but on the main process."""

    was_finished: bool
    """Nothing was left to do when it started."""

    def export(self) -> Path:
        """Free the model, write export/ from the newest checkpoint, and check it; every rank must call it.

        An export that was made of this checkpoint stays as it is.
        """
        checkpoint = self.trainer.checkpoints.newest()
        self.trainer.let_go()
        unset_hf_deepspeed_config()  # from here on a model is loaded whole, on one rank
        folder = self.folder.export
        if self.accelerator.is_main_process and not is_export_of(checkpoint, folder, self.options):
            with announced(f"exporting to '{folder}', and checking the export"):
                export_checkpoint(self.options, self.base, checkpoint, folder, self.records)
            if self.reporter:
                self.reporter.write(State.finished)
        self.accelerator.wait_for_everyone()
        return folder


@dataclass(frozen=True)
class Planned:
    """What is known of a run before its weights are loaded."""

    family: Family
    base: Path
    """The folder of the model that training starts from."""
    plan: StepPlan
    records: RecordSet
    device: torch.device
    ranks: int
    is_main: bool


def build(
    options: Options, resolved: dict[str, Any], expect: Callable[[Planned], float | None] = lambda planned: None
) -> Run:
    """Everything a run needs, from its options; every rank must call it.

    resolved: the options as plain values, for config.yaml and the tracker.
    expect: gives the GiB of memory that the run is expected to need, for metrics.jsonl, if it can tell.
    Raises ConfigError with all faults of the options before anything is loaded.
    """
    check(options, world_size(), os.environ)
    source = Path(model_folder(options)[1])
    family = find(source)
    check_family(options, family)
    check_files(source)
    accelerator = make_accelerator(options)
    folder = _make_folder(options, accelerator)
    base = _base_model(options, folder, accelerator)
    processor = load_processor(options, family, base)
    stop = StopRequest()

    train_set, measured, eval_set, eval_measured, quarantine = read_data(options, base, processor, folder, accelerator)
    evaluator = None
    if eval_set and eval_measured:
        evaluator = make_evaluator(options, accelerator, eval_set, eval_measured, stop)
    _check_figures(options, evaluator)
    flops = flops_of(options, family, base)
    speeds = read_speeds(options, base, train_set, measured, partial(measure_alike, accelerator=accelerator))
    plan = make_plan(options, flops, train_set, measured, speeds)
    augmenter = make_augmenter(options)
    ranks, is_main = accelerator.num_processes, accelerator.is_main_process
    expected_gib = expect(Planned(family, base, plan, train_set, accelerator.device, ranks, is_main))
    with announced(f"loading the weights of '{base}'"):
        model = load_model(options, family, base, accelerator.device)
    total_steps = (options.debug.one_batch and options.run.max_steps) or plan.total_steps()
    groups = parameter_groups(
        model,
        family.rules,
        rates=asdict(options.modules.lr),
        adapter_rate=options.lora.lr,
        weight_decay=options.optim.weight_decay,
        shape_of=shape_of,
        by_muon=matrices(model) if options.optim.name is OptimizerName.muon else (),
    )
    with announced(f"starting engine={options.engine.name} (an offload engine compiles its optimizer the first time)"):
        engine = _make_engine(options, accelerator, model, groups)

    checkpoints = Checkpoints(
        folder.checkpoints, accelerator, keep_last=options.checkpoint.keep_last, keep_best=options.checkpoint.keep_best
    )
    found = checkpoints.find(options.run.resume)
    trainer = Trainer(
        accelerator=accelerator,
        train_step=TrainStep(
            accelerator,
            engine,
            LearningRates(groups, options.optim, total_steps),
            objective=NextToken(),
            seed=options.run.seed,
            media=family.media,
            sources=len(train_set.specs),
            work=partial(_flops_of, plan, flops.head),
            stop=stop,
        ),
        trained=trained_state(accelerator, engine, options.optim.name, zero_stage(options)),
        steps_from=partial(_steps_from, plan, train_set, accelerator, augmenter),
        plan_digest=plan.digest(),
        name_of=train_set.name_of,
        source_names=[spec.name for spec in train_set.specs],
        intervals=Intervals(
            total_steps=total_steps,
            eval_every=options.eval.every,
            save_every=options.checkpoint.save_every,
            evaluate_first=options.eval.before_training,
            max_not_finite=options.run.max_not_finite,
            one_batch=options.debug.one_batch,
            stop_after_no_gain=options.run.stop_after_no_gain,
        ),
        quarantine=quarantine,
        checkpoints=checkpoints,
        evaluator=evaluator,
        predictions=folder.predictions,
        observers=[],
        gain=Gain(gain_figure(options)),
        peak_flops=_peak_flops(options, accelerator),
        expected_gib=expected_gib,
    )
    if found:
        with announced(f"reading '{found}'"):
            trainer.resume(found)
        for records in filter(None, (train_set, eval_set)):
            records.leave_out(quarantine.notes)
    reporter = None
    if accelerator.is_main_process:
        if folder.path.parent.absolute() == Path("outputs", options.run.name).absolute():
            folder.link_latest()  # only now: a run that is refused leaves the one before
        folder.config.write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        write_environment(folder.environment, accelerator, total_steps)
        since = trainer.position.step if found else -1
        reporter = Reporter(folder.path, options, step=trainer.position.step, total_steps=total_steps)
        trainer.observers = _observers(options, resolved, folder, trainer, since, eval_set, reporter)
    _describe(options, accelerator, model, plan, total_steps)
    records = eval_set or train_set
    return Run(options, accelerator, trainer, folder, base, records, stop, reporter, trainer.is_finished)


def _flops_of(plan: StepPlan, head: float, batch: Batch) -> float:
    """Floating-point operations of a pack; head: of each supervised token, in the head."""
    return plan.cost(batch.records) + (head * len(batch.targets) if batch.records else 0.0)


def _check_figures(options: Options, evaluator: Evaluator | None) -> None:
    """Raise ConfigError where an option names a figure that the evaluation does not give."""
    figures = evaluator.figures() if evaluator else []
    wanted = {"checkpoint.keep_best": options.checkpoint.keep_best, "run.gain_figure": options.run.gain_figure}
    faults = []
    for option, figure in wanted.items():
        if figure and figure not in figures:
            near = "".join(f" (did you mean {close}?)" for close in get_close_matches(figure, figures, n=1))
            faults.append(f"{option}: the evaluation gives no figure '{figure}'{near}; it gives {', '.join(figures)}")
    if faults:
        raise ConfigError(faults)


def _make_folder(options: Options, accelerator: Accelerator) -> RunFolder:
    """The run's folder, as the main process names it (each process has a clock of its own)."""
    given = Path(options.run.dir)
    name = [str(given.parent / given.readlink() if given.is_symlink() else given)]  # `latest` moves with the next run
    broadcast_object_list(name)
    folder = Path(name[0])
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
        except OSError as error:
            raise OmniTuneError(f"run.dir: '{folder}' cannot be made or written to ({error}); name another") from None
    check_folder(folder, accelerator)
    run = RunFolder(folder)
    if accelerator.is_main_process:
        log.info("the run's folder is '%s'", folder)
    return run


def _base_model(options: Options, folder: RunFolder, accelerator: Accelerator) -> Path:
    """The folder of the model that training starts from; a random one is written out first."""
    if options.model.path:
        return Path(options.model.path)
    base = folder.initial_model
    if accelerator.is_main_process and not base.exists():
        with announced(f"making a random model in '{base}'"):
            write_random_model(Path(options.model.random_from or ""), base, options.run.seed)
    accelerator.wait_for_everyone()
    return base


def _make_engine(options: Options, accelerator: Accelerator, model: nn.Module, groups: list[Group]) -> Engine:
    if zero_stage(options):
        return DeepSpeedEngine(accelerator, model, groups, options.optim)
    return OwnEngine(accelerator, model, groups, options.optim, compute_dtype_of(options))


def _steps_from(
    plan: StepPlan, records: RecordSet, accelerator: Accelerator, augmenter: Augmenter | None, epoch: int, step: int
):
    return StepLoader(
        plan,
        records,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        epoch=epoch,
        step_in_epoch=step,
        pin_memory=accelerator.device.type == "cuda",
        augmenter=augmenter,
    )


def _observers(
    options: Options,
    resolved: dict[str, Any],
    folder: RunFolder,
    trainer: Trainer,
    since: int,
    held_out: RecordSet | None,
    reporter: Reporter,
) -> list[Observer]:
    """since: the last step of an earlier life that is kept; -1 where the run begins anew."""
    observers: list[Observer] = [
        MetricsFile(folder.metrics, since),
        Progress(trainer.intervals.total_steps, trainer.position.step),
        reporter,
    ]
    if options.debug.profile_steps:
        observers.append(Profiler(folder.trace, options.debug.profile_steps))
    find = held_out.find if held_out is not None else None
    tracked = TrackedRun(options.run.name, folder, options.tracker, resolved, since, find)
    return [*observers, *trackings(tracked)]


def _peak_flops(options: Options, accelerator: Accelerator) -> float | None:
    """Operations a second that the devices of all ranks can do at most."""
    of_one = peak_flops(options, accelerator.device)
    if of_one is None and accelerator.device.type == "cuda":
        log.info("run.peak_tflops is not set, and nothing known for this device and precision: no MFU is reported")
    return of_one and of_one * accelerator.num_processes


def _describe(options: Options, accelerator: Accelerator, model: nn.Module, plan: StepPlan, steps: int) -> None:
    if not accelerator.is_main_process:
        return
    if options.run.max_steps and steps < options.run.max_steps:
        log.warning(
            "run.max_steps is %d, and the run ends after %s: that is all of run.epochs=%d; raise run.epochs",
            options.run.max_steps,
            counted(steps, "step"),
            options.run.epochs,
        )
    sizes = {parameter: size_of(parameter) for parameter in model.parameters()}
    total = sum(sizes.values())
    learning = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
    packs = plan.epoch(0)
    fill = sum(plan.measured.lengths[pack, 0].sum() for pack in packs) / (len(packs) * plan.limits.tokens)
    log.info(
        "%s of %s parameters are trained (%s); %s an epoch, %.1f %% full; %s; engine %s, %s on %s",
        f"{learning:,}",
        f"{total:,}",
        ", ".join(tuned_modules(options)),
        counted(len(packs), "pack"),
        100 * fill,
        counted(steps, "step"),
        options.engine.name,
        counted(accelerator.num_processes, "rank"),
        accelerator.device,
    )
