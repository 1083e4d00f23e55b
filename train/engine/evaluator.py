"""How good the model is on held-out records: its loss, and its answers compared with the references."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

from train.data.collate import collate
from train.data.plan import Limits, pack
from train.data.record_set import BadNote, Measured, RecordSet
from train.errors import BadRecord
from train.schema import Batch


@dataclass
class Prompts:
    """A batch of conversations up to their last answer, and those answers."""

    batch: Batch
    references: list[str]
    records: list[int]
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
        samples, references, kept, bad = [], [], [], []
        for index in items:
            try:
                record = self.records.record(index)
                samples.append(self.records.processor.prompt(record))
            except BadRecord as error:
                bad.append(self.records.note(index, error))
            else:
                references.append(self.records.processor.reference(record))
                kept.append(index)
        return Prompts(collate(samples, [0] * len(samples), kept), references, kept, bad)


class Evaluator:
    """Evaluates on held-out records, spread over the ranks; every rank must call `evaluate`.

    max_records: 0 = all. batch_size: answers generated at a time on each rank.
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
        max_new_tokens: int,
        batch_size: int,
    ):
        self.accelerator, self.records, self.measured = accelerator, records, measured
        self.generate, self.max_new_tokens = generate, max_new_tokens
        usable = np.concatenate(measured.by_source())
        if max_records and max_records < len(usable):
            usable = usable[np.linspace(0, len(usable) - 1, max_records).round().astype(int)]
        self.packs, _ = pack(usable.tolist(), measured.lengths, limits)
        by_length = sorted(usable.tolist(), key=lambda index: int(measured.lengths[index, 0]))
        self.prompts = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        self.bad: list[BadNote] = []

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], list[BadNote]]:
        """The figures, the same on every rank, and this rank's records that could not be decoded.

        `eval/loss`, `eval/loss/<source>`, `eval/exact_match` and `eval/exact_match/<type>`.
        """
        self.bad = []
        plain = self.accelerator.unwrap_model(model)
        was_training = model.training
        model.eval()
        family_model = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
        family_model.call_every_module = self.accelerator.num_processes > 1 or None
        with torch.no_grad():
            values = self._losses(model)
            if self.generate:
                values |= self._exact_match(family_model)
        family_model.call_every_module = None
        model.train(was_training)
        return values, self.bad

    def _losses(self, model: nn.Module) -> dict[str, float]:
        names = [spec.name for spec in self.records.specs]
        sums = torch.zeros(2, len(names), dtype=torch.float64)
        for batch, bad in self._mine(_Packs(self.records), self.packs):
            self.bad += bad
            output = model(batch=batch.to(self.accelerator.device))
            nll = output.token_losses.double().cpu()
            weights = batch.loss_weights.double()
            sums[0].index_add_(0, batch.target_sources, nll * weights)
            sums[1].index_add_(0, batch.target_sources, weights)
        loss, weight = self._summed(sums)
        values = {"eval/loss": float(loss.sum() / weight.sum().clamp(min=1e-12))}
        if len(names) > 1:
            values |= {f"eval/loss/{name}": float(loss[i] / weight[i].clamp(min=1e-12)) for i, name in enumerate(names)}
        return values

    def _exact_match(self, model: Any) -> dict[str, float]:
        types = sorted({self.measured.types[index] for group in self.prompts for index in group})
        counts = torch.zeros(2, len(types), dtype=torch.float64)
        decode = self.records.processor.tokenizer.decode
        for prompts in self._mine(_Prompts(self.records), self.prompts):
            self.bad += prompts.bad
            with self.accelerator.autocast():  # as the wrapped model's forward does: masters are float32 beside bf16
                answers = model.generate(
                    prompts.batch.to(self.accelerator.device),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    synced_gpus=self.accelerator.num_processes > 1,
                )
            for index, ids, reference in zip(prompts.records, answers, prompts.references, strict=False):
                kind = types.index(self.measured.types[index])
                counts[0, kind] += decode(ids, skip_special_tokens=True).strip() == reference.strip()
                counts[1, kind] += 1
        right, total = self._summed(counts)
        values = {"eval/exact_match": float(right.sum() / total.sum().clamp(min=1))}
        if len(types) > 1:
            values |= {f"eval/exact_match/{kind}": float(right[i] / total[i]) for i, kind in enumerate(types)}
        return values

    def _mine(self, dataset: Dataset, groups: list[list[int]]) -> DataLoader:
        """This rank's groups; equally many on every rank, since each is a set of collectives."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        groups = groups + [[]] * (-len(groups) % world_size)
        return DataLoader(dataset, batch_size=None, sampler=groups[rank::world_size])

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        summed = self.accelerator.reduce(values.to(self.accelerator.device, torch.float32), reduction="sum")
        return summed.double().cpu()
