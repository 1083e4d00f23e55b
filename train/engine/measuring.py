"""Lengths of records: measured on all cores by one process of each machine, and the same on every rank."""

import time
from collections.abc import Mapping

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list

from train.announce import SILENCE_S
from train.data.lengths import LengthCache
from train.data.record_set import BadNote, Measured, RecordSet
from train.engine.consistency import check_records
from train.engine.terminal import progress_bar

_BEAT_S = 30.0
"""Seconds between two signs of life of a process that measures: for hours' work no rank needs hours' patience."""

Found = tuple[Measured, list[BadNote]]


def measure_alike(
    sets: Mapping[str, RecordSet], cache: LengthCache | None, accelerator: Accelerator
) -> dict[str, Found]:
    """What `RecordSet.measure` finds in each set, the same on every rank; every rank must call it.

    sets: by the option that names them.
    Raises OmniTuneError where the machines hold other records or other media.
    """
    found: dict[str, Found] = {}
    working = _Working(accelerator)
    if accelerator.is_local_main_process:
        found = {what: _measure(records, what, cache, working) for what, records in sets.items()}
    working.wait_for_all()
    for what in sets:
        check_records(found[what][0] if found else None, what, accelerator)
    if accelerator.num_processes == 1:
        return found
    return {what: _from_main(found.get(what), records, accelerator) for what, records in sets.items()}


class _Working:
    """Lets all ranks know that some still work, so that none waits in a collective for long."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self._since = accelerator, time.monotonic()

    def beat(self) -> None:
        """Called by a process at work, every now and then."""
        if time.monotonic() - self._since > _BEAT_S:
            self._some_are_working(True)
            self._since = time.monotonic()

    def wait_for_all(self) -> None:
        """Called by each process once its work is done."""
        while self._some_are_working(False):
            pass

    def _some_are_working(self, mine: bool) -> bool:
        count = torch.tensor([float(mine)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum").item())


def _measure(records: RecordSet, what: str, cache: LengthCache | None, working: _Working) -> Found:
    is_hidden = not working.accelerator.is_main_process
    with progress_bar(f"measuring {what}: record", len(records), delay_s=SILENCE_S, hidden=is_hidden) as bar:

        def on_records(count: int) -> None:
            bar.update(count)
            working.beat()

        return records.measure(cache, on_records)


def _from_main(found: Found | None, records: RecordSet, accelerator: Accelerator) -> Found:
    """What the main process found."""
    table = np.zeros((len(records), 4), np.int32)  # lengths, and the number of the type
    about: list[tuple[list[str], list[BadNote]]] = [([], [])]
    if accelerator.is_main_process and found:
        measured, bad = found
        names = list(dict.fromkeys(measured.types))
        codes = {name: code for code, name in enumerate(names)}
        table[:, :3] = measured.lengths
        table[:, 3] = np.fromiter((codes[name] for name in measured.types), np.int32, len(records))
        about = [(names, bad)]
    broadcast_object_list(about)
    received = broadcast(torch.from_numpy(table).to(accelerator.device)).cpu().numpy()
    if accelerator.is_main_process and found:
        return found
    [(names, bad)] = about
    types = [names[code] for code in received[:, 3].tolist()]
    return Measured(np.ascontiguousarray(received[:, :3]), types, records.ends), bad
