"""The data path on one core: reading headers, planning a million records, sharing out work, decoding.

python benchmarks/data.py
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import finish, measured, memory_status, print_table, use_one_core
from workload import draw

from train.config import MODULES, DataOptions
from train.data.augment import Augmentation, Augmenter
from train.data.lengths import LengthCache
from train.data.plan import Limits, assign, plan_epoch
from train.data.record_set import Measured, RecordSet, SourceSpec
from train.data.workers import UNWATCHED, Workers
from train.families.megrezo.flops import megrezo_flops
from train.families.megrezo.model import MegrezO, MegrezOConfig
from train.families.registry import find
from train.preflight.examine import examine

ROOT = Path(__file__).resolve().parents[1]
RANKS, PACKS_EACH = 8, 4
"""Ranks that share a step, and packs of each."""

WARM_UP = 100
"""Records read before the clock starts."""

HEADER_RUNS = 5


def header_figures(records: RecordSet) -> dict[str, float]:
    """Records measured a second, from files and from the cache, after a few that load the decoders; medians."""
    for index in range(min(len(records), WARM_UP)):
        records.processor.measure(records.record(index))
    fresh, cached = [], []
    for _ in range(HEADER_RUNS):
        with tempfile.TemporaryDirectory() as folder:
            measure = partial(records.measure, LengthCache(Path(folder), "benchmark"))
            (_, bad), cost = measured(measure)
            fresh.append(len(records) / cost.seconds)
            cached.append(len(records) / measured(measure)[1].seconds)
        assert not bad, bad
    return {
        "headers_records_per_s": statistics.median(fresh),
        "headers_cached_records_per_s": statistics.median(cached),
    }


def cores_figures(model: Path, file: Path, times: int) -> dict[str, float]:
    """Records measured a second by the wall's clock, of the file `times` over: by this process, and on all cores.

    With the cores a first time, which keeps the lengths; again, from what was kept; and with processes that start.
    """
    processor = find(model).load_processor(model)
    with tempfile.TemporaryDirectory() as folder:
        repeated = Path(folder, "records.jsonl")
        repeated.write_text("\n".join([file.read_text(encoding="utf-8").strip()] * times), encoding="utf-8")
        source, cache = SourceSpec("train", str(repeated), str(file.parent)), LengthCache(Path(folder), "benchmark")

        def rate(workers: Workers, cache: LengthCache | None) -> float:
            records = RecordSet(
                [source], processor, max_tokens=DataOptions().max_tokens, too_long="quarantine", workers=workers
            )
            start = time.perf_counter()
            _, bad = records.measure(cache)
            assert not bad, bad[:3]
            return len(records) / (time.perf_counter() - start)

        all_cores = Workers(1)
        figures = {"one_process": rate(UNWATCHED, None), "all_cores_first_start": rate(all_cores, cache)}
        figures |= {"all_cores_cached": rate(all_cores, cache), "all_cores": rate(all_cores, None)}
    cores = len(os.sched_getaffinity(0))
    return {"cores": cores} | {f"wall_{name}_records_per_s": value for name, value in figures.items()}


def decode_figures(records: RecordSet, count: int) -> dict[str, float]:
    """Records encoded a second, spread evenly over the set: all, and those of each type."""
    chosen = range(0, len(records), max(len(records) // count, 1))
    by_type: dict[str, list[float]] = {}
    for index in chosen:
        record = records.record(index)
        start = time.process_time()
        records.processor.encode(record)
        by_type.setdefault(record.type, []).append(time.process_time() - start)
    seconds = [taken for of_type in by_type.values() for taken in of_type]
    figures = {"decode_records_per_s": len(seconds) / sum(seconds)}
    return figures | {f"decode_{name}_records_per_s": len(of) / sum(of) for name, of in sorted(by_type.items())}


def doctor_figures(records: RecordSet) -> dict[str, float]:
    """Records that `omnitune doctor` reads, decodes and hashes a second."""
    examined, cost = measured(lambda: examine(records, None))
    assert not examined.bad, examined.bad[:3]
    return {"doctor_records_per_s": len(records) / cost.seconds}


EVERYTHING = Augmentation(
    speed=(0.9, 1.0, 1.1),
    noise_db=(0, 20),
    echo_s=(0.1, 0.6),
    telephone=True,
    gain_db=(-10, 10),
    freq_mask=27,
    time_mask=40,
    color=0.3,
    jpeg=(30, 90),
)
"""All that `data.augment` has, at its default share."""


def changed_figures(records: RecordSet, count: int) -> dict[str, float]:
    """Records encoded a second with every random change on, over the rate without, each record in turn.

    Nothing where torchaudio is not installed.
    """
    if find_spec("torchaudio") is None:
        return {}
    augmenter = Augmenter([EVERYTHING] * len(records.specs), seed=0)
    seconds = {False: 0.0, True: 0.0}
    for place, index in enumerate(range(0, len(records), max(len(records) // count, 1))):
        record = records.record(index)
        for is_changed in (False, True):
            speed = EVERYTHING.speed[place % len(EVERYTHING.speed)]
            changes = augmenter.changes(0, index, 0, speed) if is_changed else None
            start = time.process_time()
            records.encode(record, changes)
            if place >= min(WARM_UP, count) // 5:
                seconds[is_changed] += time.process_time() - start
    return {"decode_changed_over_plain": seconds[False] / seconds[True]}


def memory_figures(model: Path, count: int) -> dict[str, float]:
    """What is resident while so many records of text, 300 bytes each, are measured and then planned."""
    options = DataOptions()
    limits = Limits(options.max_tokens, {"image": options.max_patches, "audio": options.max_frames})
    processor = find(model).load_processor(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "records.jsonl")
        with file.open("w", encoding="utf-8") as out:
            out.writelines(_text_record(number) for number in range(count))
        source, cache = SourceSpec("train", str(file), folder), LengthCache(Path(folder), "benchmark")

        def measure() -> tuple[RecordSet, Measured]:
            records = RecordSet([source], processor, max_tokens=limits.tokens, too_long="quarantine")
            held, bad = records.measure(cache)
            assert not bad, bad[:3]
            return records, held

        before = memory_status("VmRSS")
        (_, held), measuring = measured(measure)
        between = memory_status("VmRSS")
        _, planning = measured(lambda: plan_epoch(held.lengths, held.by_source(), [1.0], limits, seed=0, epoch=0))
    sizes = {
        "before": before,
        "measuring": before + measuring.peak_bytes,
        "measured": between,
        "planning": between + planning.peak_bytes,
    }
    figures = {f"resident_{when}_mib": size / 2**20 for when, size in sizes.items()}
    return {"texts": count, "texts_records_per_s": count / measuring.seconds} | figures


def _text_record(number: int) -> str:
    """A line of about 300 bytes."""
    turns = [
        {"role": "user", "content": f"What is {number} plus one? Answer in words. " + "Take your time. " * 8},
        {"role": "assistant", "content": f"The number after {number}."},
    ]
    return json.dumps({"type": f"text {number % 10}", "conversations": turns}) + "\n"


def plan_figures(lengths: np.ndarray) -> tuple[dict[str, float], list[list[int]]]:
    """Time, fill and memory of an epoch's plan."""
    options = DataOptions()
    limits = Limits(options.max_tokens, {"image": options.max_patches, "audio": options.max_frames})
    packs, cost = measured(lambda: plan_epoch(lengths, [np.arange(len(lengths))], [1.0], limits, seed=0, epoch=0))
    held = sum(sys.getsizeof(pack) + sum(map(sys.getsizeof, pack)) for pack in packs) + sys.getsizeof(packs)
    figures = {
        "plan_s": cost.seconds,
        "packs": len(packs),
        "pack_fill": float(lengths[:, 0].sum()) / (limits.tokens * len(packs)),
        "plan_mib": (held + lengths.nbytes) / 2**20,
        "plan_peak_mib": cost.peak_bytes / 2**20,
    }
    return figures, packs


def balance_figures(lengths: np.ndarray, packs: Sequence[Sequence[int]]) -> dict[str, float]:
    """Dearest rank over mean rank, by predicted work of the published model, and what the sharing out costs."""
    with torch.device("meta"):
        model = MegrezO(MegrezOConfig())
    costs = megrezo_flops(model, MODULES).of(lengths)
    pack_costs = np.array([costs[pack].sum() for pack in packs])
    in_step = RANKS * PACKS_EACH
    steps = pack_costs[: len(packs) // in_step * in_step].reshape(-1, in_step)
    start = time.process_time()
    shared = [assign(step.tolist(), RANKS) for step in steps]
    seconds = time.process_time() - start
    work = np.array([[step[rank].sum() for rank in ranks] for step, ranks in zip(steps, shared, strict=True)])
    in_order = steps.reshape(len(steps), RANKS, PACKS_EACH).sum(axis=2)
    return {
        "balance_steps": len(steps),
        "balance_max_over_mean_p50": float(np.percentile(_imbalance(work), 50)),
        "balance_max_over_mean_p99": float(np.percentile(_imbalance(work), 99)),
        "balance_max_over_mean_worst": float(_imbalance(work).max()),
        "balance_in_order_p99": float(np.percentile(_imbalance(in_order), 99)),
        "assign_ms_per_step": 1000 * seconds / len(steps),
    }


def _imbalance(work: np.ndarray) -> np.ndarray:
    """Dearest rank over the mean of each step: (steps, ranks) to (steps,)."""
    return work.max(axis=1) / work.mean(axis=1)


def figures_of(chosen: argparse.Namespace) -> dict[str, Any]:
    """Everything that is reported."""
    processor = find(chosen.model).load_processor(chosen.model)
    source = SourceSpec("train", str(chosen.records), str(chosen.records.parent))
    records = RecordSet([source], processor, max_tokens=DataOptions().max_tokens, too_long="quarantine")
    figures: dict[str, Any] = {"records": len(records), "planned_records": chosen.planned}
    figures |= memory_figures(chosen.model, chosen.texts)
    figures |= header_figures(records) | decode_figures(records, chosen.decoded)
    figures |= doctor_figures(records) | changed_figures(records, chosen.decoded)
    figures |= cores_figures(chosen.model, chosen.records, chosen.times)
    lengths = draw(chosen.planned).lengths()
    planned, packs = plan_figures(lengths)
    return figures | planned | balance_figures(lengths, packs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=Path, default=ROOT / "data/sample/train.jsonl", help="for headers, decoding")
    parser.add_argument("--model", type=Path, default=ROOT / "data/tiny", help="folder whose processor reads them")
    parser.add_argument("--decoded", type=int, default=600, help="records to decode")
    parser.add_argument("--times", type=int, default=40, help="how often the records stand in the file for all cores")
    parser.add_argument("--planned", type=int, default=1_000_000, help="records of the workload to plan")
    parser.add_argument("--texts", type=int, default=20_000, help="records of text whose measuring takes memory")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args(arguments)
    use_one_core()
    figures = figures_of(chosen)
    print_table([{"figure": name, "value": value} for name, value in figures.items()])
    finish(figures, chosen.json)


if __name__ == "__main__":
    main()
