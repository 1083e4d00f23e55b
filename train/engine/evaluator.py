"""How good the model is on held-out records: its loss, and its answers compared with the references."""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from train.data.collate import collate
from train.data.plan import Limits, pack
from train.data.record_set import BadNote, Measured, RecordSet
from train.errors import BadRecord, ConfigError
from train.inference.metrics import METRICS
from train.schema import Batch, Record


@dataclass(frozen=True)
class Prediction:
    """An answer beside its reference: a line of predictions/."""

    file: str
    line: int
    type: str
    prompt: str
    """The turns before the answer, a line each, with <image> and <audio> where media stand."""
    reference: str
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, the same on every rank."""

    values: dict[str, float]
    """`eval/loss`, `eval/loss/<source>`, `eval/<metric>`, `eval/<metric>/<type>`."""
    by_type: dict[str, dict[str, float]]
    """For each type of records `records` (those answered), `loss`, and the metrics."""
    overall: dict[str, float]
    """The same of all records."""
    predictions: list[Prediction]
    """In the order of the records."""
    bad: list[BadNote]
    """Records that could not be decoded."""


@dataclass
class Prompts:
    """A batch of conversations up to their last answer, and the whole conversations."""

    batch: Batch
    records: list[Record]
    bad: list[BadNote]


class _Packs(Dataset):
    def __init__(self, records: RecordSet):
        self.records = records

    def __getitem__(self, items: Sequence[int]) -> tuple[Batch, list[BadNote]]:
        return self.records.batch(items)


class _Prompts(Dataset):
    def __init__(self, records: RecordSet):
        self.records = records

    def __getitem__(self, items: Sequence[int]) -> Prompts:
        samples, records, kept, bad = [], [], [], []
        for index in items:
            try:
                with self.records.guarded(index):
                    record = self.records.record(index)
                    samples.append(self.records.processor.prompt(record))
            except BadRecord as error:
                bad.append(self.records.note(index, error))
            else:
                records.append(record)
                kept.append(index)
        return Prompts(collate(samples, [0] * len(samples), kept), records, bad)


class Evaluator:
    """Evaluates on held-out records, spread over the ranks; every rank must call `evaluate`.

    max_records: 0 = all. metrics: names of `METRICS`, or `<name>/<type>` for the records of that type alone.
    batch_size: answers generated at a time on each rank.

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
    ):
        self.accelerator, self.records, self.measured = accelerator, records, measured
        self.generate, self.max_new_tokens = generate, max_new_tokens
        usable = np.concatenate(measured.by_source())
        self.metrics = _types_by_metric(metrics, {measured.types[index] for index in usable})
        if max_records and max_records < len(usable):
            usable = usable[np.linspace(0, len(usable) - 1, max_records).round().astype(int)]
        self.types = sorted({measured.types[index] for index in usable})
        self.packs, _ = pack(usable.tolist(), measured.lengths, limits)
        by_length = sorted(usable.tolist(), key=lambda index: int(measured.lengths[index, 0]))
        self.prompts = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        self.bad: list[BadNote] = []

    def figures(self) -> list[str]:
        """Names of the values that an evaluation gives, where every record can be decoded."""
        names = [spec.name for spec in self.records.specs]
        figures = ["eval/loss", *(f"eval/loss/{name}" for name in names if len(names) > 1)]
        for metric, types in self.metrics.items() if self.generate else ():
            measured = sorted(types.intersection(self.types))
            figures += [f"eval/{metric}"] * bool(measured)
            figures += [f"eval/{metric}/{name}" for name in measured if len(self.types) > 1]
        return figures

    def evaluate(self, model: nn.Module) -> Evaluation:
        """The loss of the model, which may be wrapped, and its answers."""
        self.bad = []
        plain = self.accelerator.unwrap_model(model)
        was_training = model.training
        model.eval()
        family_model = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
        family_model.call_every_module = self.accelerator.num_processes > 1 or None
        sums = torch.zeros(2, 2 + len(self.metrics), len(self.types), dtype=torch.float64)
        predictions: list[tuple[int, Prediction]] = []
        with torch.no_grad():
            values = self._losses(model, sums[:, 1])
            if self.generate:
                predictions = self._answers(family_model, sums)
        family_model.call_every_module = None
        model.train(was_training)

        sums = self._summed(sums)
        overall = self._figures(sums.sum(dim=2))
        by_type = {name: self._figures(sums[:, :, index]) for index, name in enumerate(self.types)}
        for metric in self.metrics:
            values |= {f"eval/{metric}": overall[metric]} if metric in overall else {}
            if len(self.types) > 1:
                values |= {f"eval/{metric}/{name}": row[metric] for name, row in by_type.items() if metric in row}
        in_order = sorted(gather_object(predictions), key=lambda item: item[0])
        return Evaluation(values, by_type, overall, [prediction for _, prediction in in_order], gather_object(self.bad))

    def _losses(self, model: nn.Module, by_type: Tensor) -> dict[str, float]:
        """The loss and those of the sources; `by_type` (2, types) takes this rank's sums of losses and of weights."""
        names = [spec.name for spec in self.records.specs]
        by_source = torch.zeros(2, len(names), dtype=torch.float64)
        for batch, bad in self._mine(_Packs(self.records), self.packs):
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

    def _answers(self, model: Any, sums: Tensor) -> list[tuple[int, Prediction]]:
        """This rank's answers by record; `sums` (2, figures, types) takes their number and their scores."""
        predictions = []
        processor = self.records.processor
        for prompts in self._mine(_Prompts(self.records), self.prompts):
            self.bad += prompts.bad
            with self.accelerator.autocast():  # as the wrapped model's forward does: masters are float32 beside bf16
                answers = model.generate(
                    prompts.batch.to(self.accelerator.device),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    synced_gpus=self.accelerator.num_processes > 1,
                )
            for index, record, ids in zip(prompts.batch.records, prompts.records, answers, strict=False):
                answer = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
                reference = processor.reference(record).strip()
                kind = self._type_index(index)
                sums[0, 0, kind] += 1
                for figure, (metric, types) in enumerate(self.metrics.items(), start=2):
                    if record.type in types:
                        sums[:, figure, kind] += torch.tensor(METRICS[metric](answer, reference), dtype=torch.float64)
                about = record.file, record.line, record.type, _asked(record)
                predictions.append((index, Prediction(*about, reference, answer)))
        return predictions

    def _figures(self, sums: Tensor) -> dict[str, float]:
        """Number of records, loss and metrics of sums (2, figures), but for metrics that measured nothing."""
        ratios = (sums[0] / sums[1]).tolist()
        metrics = {name: ratio for name, ratio in zip(self.metrics, ratios[2:], strict=True) if ratio == ratio}
        return {"records": float(sums[0, 0]), "loss": ratios[1], **metrics}

    def _type_index(self, index: int) -> int:
        return self.types.index(self.measured.types[index])

    def _mine(self, dataset: Dataset, groups: list[list[int]]) -> DataLoader:
        """This rank's groups; equally many on every rank, since each is a set of collectives."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        groups = groups + [[]] * (-len(groups) % world_size)
        return DataLoader(dataset, batch_size=None, sampler=groups[rank::world_size])

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        summed = self.accelerator.reduce(values.to(self.accelerator.device, torch.float32), reduction="sum")
        return summed.double().cpu()


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """Write them as JSON lines, into a folder that is made where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # A file's name may hold bytes that are no text; escaped, the line is still JSON.
    with file.open("w", encoding="utf-8", errors="backslashreplace") as out:
        out.writelines(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)


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
