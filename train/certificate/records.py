"""The sample of a user's records by which a certificate is made; media are opened in a worker, under its watchdog."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from train.data.plan import Limits
from train.data.record_set import BadNote, RecordSet
from train.data.workers import Results
from train.schema import KINDS, Batch, Lengths

_LOOKED_AT = 64
"""Records among which the sample is chosen, spread evenly."""


def choose(records: RecordSet, limits: Limits, count: int) -> list[int]:
    """Up to `count` records that can be used and fit into one pack, spread evenly; a record of each medium first."""
    indices = np.linspace(0, len(records) - 1, min(len(records), _LOOKED_AT)).round().astype(int).tolist()
    found = zip(indices, _in_worker(records, _lengths, indices), strict=True)
    sizes = {index: size.row() for index, size in found if isinstance(size, Lengths)}
    spread = list(sizes)[:: max(1, len(sizes) // count)]
    first = [next((index for index, row in sizes.items() if row[1 + kind]), None) for kind in range(len(KINDS))]
    chosen: list[int] = []
    total = np.zeros(1 + len(KINDS), dtype=np.int64)
    for index in dict.fromkeys(index for index in [*first, *spread, *sizes] if index is not None):
        after = total + sizes[index]
        if len(chosen) < count and (after <= limits.row()).all():
            chosen.append(index)
            total = after
    alone = batches(records, [[index] for index in chosen])
    return sorted(index for index, batch in zip(chosen, alone, strict=True) if batch.records)


def batches(records: RecordSet, packs: Sequence[Sequence[int]]) -> list[Batch]:
    """The packs, decoded."""
    return _in_worker(records, _batch, packs)


def _in_worker(records: RecordSet, job: Any, items: Sequence[Any]) -> list[Any]:
    workers = replace(records.workers, count=min(records.workers.count, 1))
    return list(Results(partial(job, records), lambda done: list(items)[done:], records.given_up, workers))


def _lengths(records: RecordSet, index: int, watch: Any) -> Lengths | BadNote:
    return records.attempt(index, records.measure_one, watch)


def _batch(records: RecordSet, pack: Sequence[int], watch: Any) -> Batch:
    return records.batch(pack, watch)[0]
