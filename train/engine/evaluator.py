"""How good the model is on held-out records: its loss, and its answers compared with the references."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from train.data.collate import collate
from train.data.plan import Limits, pack
from train.data.record_set import BadNote, Measured, RecordSet
from train.data.watchdog import Watchdog
from train.data.workers import Results
from train.engine.stop import StopRequest
from train.errors import ConfigError
from train.inference.metrics import METRICS
from train.inference.predictions import Prediction
from train.modules.packed import PackedModel, without_adapters
from train.schema import KINDS, Batch, Record, Sample

R = TypeVar("R")

CUT_ANSWERS = "cut_answers"
"""The share of answers that were cut at `max_new_tokens`, among the figures of an evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, the same on every rank."""

    values: dict[str, float]
    """`eval/loss`, `eval/loss/<source>`, `eval/<metric>`, `eval/<metric>/<type>`, `eval/cut_answers`."""
    by_type: dict[str, dict[str, float]]
    """For each type of records `records` (those answered), `loss`, the metrics, and `cut_answers`."""
    overall: dict[str, float]
    """The same of all records."""
    predictions: list[Prediction]
    """In the order of the records."""
    bad: list[BadNote]
    """Records that could not be decoded."""

    def table(self) -> str:
        """A row for each type of records and one for all, a column for each figure; "-" where nothing was measured."""
        columns = [name for name, value in self.overall.items() if name != "records" or value]
        cells = [["type", *columns]]
        for name, figures in [*self.by_type.items(), ("all", self.overall)]:
            cells.append([name or "(none)", *(_number(column, figures.get(column)) for column in columns)])
        first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
        return "\n".join(
            "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
            for row in cells
        )


def _number(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if column == "records" else f"{value:.4f}"


@dataclass
class Prompts:
    """A batch of conversations up to their last answer, and the whole conversations."""

    batch: Batch
    records: list[Record]
    bad: list[BadNote]


def _prompts(records: RecordSet, indices: Sequence[int], watch: Watchdog) -> Prompts:
    samples, asked, kept, bad = [], [], [], []
    for index in indices:
        found = records.attempt(index, partial(_prompt, records), watch)
        if isinstance(found, BadNote):
            bad.append(found)
            continue
        samples.append(found[0])
        asked.append(found[1])
        kept.append(index)
    return Prompts(collate(samples, [0] * len(samples), kept), asked, bad)


def _prompt(records: RecordSet, record: Record) -> tuple[Sample, Record]:
    return records.processor.prompt(record), record


class Evaluator:
    """Evaluates on held-out records, spread over the ranks; every rank must call `evaluate`.

    limits: what a pack may hold, and a batch of prompts too.
    max_records: 0 = all. metrics: names of `METRICS`, or `<name>/<type>` for the records of that type alone.
    batch_size: most answers generated at a time on each rank.
    stop: asked after each batch, so that all ranks know of it alike.

    Raises ConfigError where `metrics` names a type that no record has.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        records: RecordSet,
        measured: Measured,
        limits: Limits,
        *,
        max_records: int,
        generate: bool,
        metrics: Sequence[str],
        max_new_tokens: int,
        batch_size: int,
        stop: StopRequest | None = None,
    ):
        self.accelerator, self.records, self.measured = accelerator, records, measured
        self.stop = stop or StopRequest()
        self.generate, self.max_new_tokens = generate, max_new_tokens
        usable = np.concatenate(measured.by_source())
        self.metrics = _types_by_metric(metrics, {measured.types[index] for index in usable})
        if max_records and max_records < len(usable):
            usable = usable[np.linspace(0, len(usable) - 1, max_records).round().astype(int)]
        self.types = sorted({measured.types[index] for index in usable})
        self.packs, _ = pack(usable.tolist(), measured.lengths, limits)
        self.prompts = prompt_batches(usable.tolist(), measured.lengths, limits, batch_size)
        self.bad: list[BadNote] = []

    def figures(self) -> list[str]:
        """Names of the values that an evaluation gives, where every record can be decoded."""
        names = [spec.name for spec in self.records.specs]
        figures = ["eval/loss", *(f"eval/loss/{name}" for name in names if len(names) > 1)]
        for metric, types in self.metrics.items() if self.generate else ():
            measured = sorted(types.intersection(self.types))
            figures += [f"eval/{metric}"] * bool(measured)
            figures += [f"eval/{metric}/{name}" for name in measured if len(self.types) > 1]
        return figures + [f"eval/{CUT_ANSWERS}"] * self.generate

    def evaluate(self, model: nn.Module) -> Evaluation | None:
        """The loss of the model, which may be wrapped, and its answers; None if some rank was asked to stop."""
        self.bad = []
        was_training = model.training
        model.eval()
        family_model = without_adapters(self.accelerator.unwrap_model(model))
        sums = torch.zeros(2, 3 + len(self.metrics), len(self.types), dtype=torch.float64)
        predictions: list[tuple[int, Prediction]] = []
        try:
            with torch.no_grad(), family_model.running_every_tower(self.accelerator.num_processes > 1):
                values = self._losses(model, sums[:, 1])
                if self.generate:
                    predictions = self._answers(family_model, sums)
        except _Stopped:
            return None
        finally:
            model.train(was_training)

        sums = self._summed(sums)
        overall = self._figures(sums.sum(dim=2))
        by_type = {name: self._figures(sums[:, :, index]) for index, name in enumerate(self.types)}
        for metric in self.metrics:
            values |= {f"eval/{metric}": overall[metric]} if metric in overall else {}
            if len(self.types) > 1:
                values |= {f"eval/{metric}/{name}": row[metric] for name, row in by_type.items() if metric in row}
        values |= {f"eval/{CUT_ANSWERS}": overall[CUT_ANSWERS]} if CUT_ANSWERS in overall else {}
        in_order = sorted(gather_object(predictions), key=lambda item: item[0])
        return Evaluation(values, by_type, overall, [prediction for _, prediction in in_order], gather_object(self.bad))

    def _losses(self, model: nn.Module, by_type: Tensor) -> dict[str, float]:
        """The loss and those of the sources; `by_type` (2, types) takes this rank's sums of losses and of weights."""
        names = [spec.name for spec in self.records.specs]
        by_source = torch.zeros(2, len(names), dtype=torch.float64)
        for batch, bad in self._mine(self.records.batch, self.packs):
            self.bad += bad
            output = model(batch=batch.to(self.accelerator.device))
            weights = batch.loss_weights.double()
            nll = output.token_losses.double().cpu() * weights
            samples = torch.searchsorted(batch.cu_seqlens[1:].long(), batch.target_positions, right=True)
            kinds = [self._type_index(index) for index in batch.records] or [0]  # a filler has weight 0
            types = torch.tensor(kinds)[samples]
            for sums, groups in ((by_source, batch.target_sources), (by_type, types)):
                sums[0].index_add_(0, groups, nll)
                sums[1].index_add_(0, groups, weights)
        loss, weight = self._summed(by_source)
        values = {"eval/loss": float(loss.sum() / weight.sum().clamp(min=1e-12))}
        if len(names) > 1:
            values |= {f"eval/loss/{name}": float(loss[i] / weight[i].clamp(min=1e-12)) for i, name in enumerate(names)}
        return values

    def _answers(self, model: PackedModel, sums: Tensor) -> list[tuple[int, Prediction]]:
        """This rank's answers by record; `sums` (2, figures, types) takes their number and their scores."""
        predictions = []
        processor = self.records.processor
        for prompts in self._mine(partial(_prompts, self.records), self.prompts):
            self.bad += prompts.bad
            answers = model.generate(
                prompts.batch.to(self.accelerator.device),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                synced_gpus=self._shards_weights(),
                cache_implementation="static",  # does not copy all keys and values for each token
                disable_compile=True,  # transformers would compile for each length of the prompts, on CUDA
            )
            for index, record, ids in zip(prompts.batch.records, prompts.records, answers, strict=False):
                answer = str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()
                reference = processor.reference(record).strip()
                kind = self._type_index(index)
                sums[0, 0, kind] += 1
                sums[:, -1, kind] += torch.tensor([len(ids) >= self.max_new_tokens, 1], dtype=torch.float64)
                for figure, (metric, types) in enumerate(self.metrics.items(), start=2):
                    if record.type in types:
                        sums[:, figure, kind] += torch.tensor(METRICS[metric](answer, reference), dtype=torch.float64)
                about = record.file, record.line, record.type, _asked(record)
                predictions.append((index, Prediction(*about, reference, answer)))
        return predictions

    def _figures(self, sums: Tensor) -> dict[str, float]:
        """Number of records, loss, metrics and cut answers of sums (2, figures), but for what measured nothing."""
        ratios = (sums[0] / sums[1]).tolist()
        names = [*self.metrics, CUT_ANSWERS]
        metrics = {name: ratio for name, ratio in zip(names, ratios[2:], strict=True) if ratio == ratio}
        return {"records": float(sums[0, 0]), "loss": ratios[1], **metrics}

    def _type_index(self, index: int) -> int:
        return self.types.index(self.measured.types[index])

    def _shards_weights(self) -> bool:
        """Whether ranks hold parts of the weights (ZeRO-3), so that all must run every forward of a generation."""
        plugin = self.accelerator.state.deepspeed_plugin
        return self.accelerator.num_processes > 1 and plugin is not None and plugin.zero_stage == 3

    def _mine(self, job: Callable[[Any, Watchdog], R], groups: list[list[int]]) -> Iterator[R]:
        """What `job` makes of this rank's groups; equally many on every rank, since each is a set of collectives.

        Raises _Stopped on every rank once one was asked to stop. What was given up at the end is so on all of them.
        """
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        mine = (groups + [[]] * (-len(groups) % world_size))[rank::world_size]
        for result in Results(job, lambda done: mine[done:], self.records.given_up, self.records.workers):
            yield result
            if self._summed(torch.tensor([float(self.stop.requested)])).any():
                raise _Stopped
        for given_up in gather_object([self.records.given_up]):
            self.records.given_up |= given_up

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        summed = self.accelerator.reduce(values.to(self.accelerator.device, torch.float32), reduction="sum")
        return summed.double().cpu()


class _Stopped(Exception):
    """Some rank was asked to stop."""


def prompt_batches(records: Sequence[int], lengths: np.ndarray, limits: Limits, most: int) -> list[list[int]]:
    """The records by length, at most `most` at a time, within the limits as batches padded to the longest prompt.

    lengths: int (all records, 1 + kinds), rows of `Lengths`; a record over the limits is a batch of its own.
    """
    most_units = limits.row()[1:]
    batches: list[list[int]] = []
    units = np.zeros(len(KINDS), dtype=np.int64)
    for record in sorted(records, key=lambda index: int(lengths[index, 0])):
        longest, own = int(lengths[record, 0]), lengths[record, 1:]
        count = len(batches[-1]) + 1 if batches else most + 1
        if count <= most and count * longest <= limits.tokens and (units + own <= most_units).all():
            batches[-1].append(record)
            units = units + own
        else:
            batches.append([record])
            units = own
    return batches


def _types_by_metric(metrics: Sequence[str], types: Collection[str]) -> dict[str, set[str]]:
    """The types of records that each metric is for."""
    chosen: dict[str, set[str]] = {}
    for entry in metrics:
        metric, _, kind = entry.partition("/")
        if kind and kind not in types:
            known = ", ".join(sorted(types))
            raise ConfigError(
                [f"eval.metrics: '{entry}', but no held-out record is of type '{kind}'; there are {known}"]
            )
        chosen.setdefault(metric, set()).update([kind] if kind else types)
    return chosen


def _asked(record: Record) -> str:
    """The turns before the last answer, as text."""
    roles = [turn.role for turn in record.turns]
    before = record.turns[: len(roles) - 1 - roles[::-1].index("assistant")]
    return "\n".join(
        f"{turn.role}: "
        + "".join(str(part.content) if part.kind == "text" else f"<{part.kind}>" for part in turn.parts)
        for turn in before
    )
