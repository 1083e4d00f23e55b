"""Record sets, their lengths and the steps of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import media_of
from tests.runs import SAMPLE, write_records
from train.data.loader import StepLoader, StepPlan
from train.data.plan import Limits
from train.data.record_set import Measured, RecordSet, SourceSpec, _within_bounds
from train.errors import OmniTuneError
from train.families.registry import find
from train.schema import Lengths

TINY = SAMPLE.parent / "tiny"
LIMITS = Limits(256, {"image": 10_000, "audio": 10_000})


@pytest.fixture(scope="module")
def processor() -> Any:
    return find(TINY).load_processor(TINY)


def record_set(folder: Path, processor: Any, **settings: Any) -> RecordSet:
    spec = SourceSpec("train", str(folder / "train.jsonl"), str(SAMPLE))
    return RecordSet([spec], processor, max_tokens=256, too_long="quarantine", **settings)


def plan_of(measured: Measured, **changes: Any) -> StepPlan:
    settings: dict[str, Any] = {"packs_per_step": 3, "seed": 0, "epochs": 2, "max_steps": None}
    return StepPlan(measured, [1.0], LIMITS, **{**settings, **changes})


def test_measured_lengths_are_those_of_the_batches(tmp_path: Path, processor: Any) -> None:
    write_records(tmp_path)
    records = record_set(tmp_path, processor)
    measured, bad = records.measure()
    assert bad == []
    for index in range(len(records)):
        batch, _ = records.batch([index])
        assert measured.lengths[index].tolist() == [
            len(batch.input_ids),
            sum(height * width for height, width in media_of(batch, "image").sizes.tolist()),
            sum(media_of(batch, "audio").sizes.tolist()),
        ]


def test_a_few_records_are_the_shortest_of_each_mix(tmp_path: Path, processor: Any) -> None:
    write_records(tmp_path, train=40)
    records = record_set(tmp_path, processor)
    lengths = records.measure()[0].lengths
    mixes = [(bool(patches), bool(frames)) for _, patches, frames in lengths]
    batch = records.few()
    assert sorted(mixes[index] for index in batch.records) == sorted(set(mixes))
    for index in batch.records:
        assert lengths[index, 0] == min(lengths[other, 0] for other, mix in enumerate(mixes) if mix == mixes[index])
    records.given_up = dict.fromkeys(range(40), "hung")
    with pytest.raises(OmniTuneError, match=r"none of the records in .* can be used; the first: .*hung"):
        records.few()


def test_a_few_records_are_bounded() -> None:
    """A mix whose media are there already is left out where it would be too much; what brings a medium stays."""
    text, image, clip, both = (
        (20, 0, Lengths(20)),
        (700, 1, Lengths(700, {"image": 9000})),
        (800, 2, Lengths(800, {"audio": 3000})),
        (900, 3, Lengths(900, {"image": 100, "audio": 100})),
    )
    assert _within_bounds([text, image, clip, both]) == [0, 1, 2]
    assert _within_bounds([text, both]) == [0, 3]
    assert _within_bounds([(1, 5, Lengths(1, {"image": 1})), (2, 6, Lengths(2, {"image": 1, "audio": 2}))]) == [5, 6]


def test_every_record_once_an_epoch_whatever_the_ranks(tmp_path: Path, processor: Any) -> None:
    write_records(tmp_path)
    records = record_set(tmp_path, processor)
    measured, _ = records.measure()
    plan = plan_of(measured, epochs=1)
    for world_size in (1, 2, 4):
        ranks = [list(StepLoader(plan, records, rank=rank, world_size=world_size)) for rank in range(world_size)]
        seen = [index for steps in ranks for step in steps for batch in step.batches for index in batch.records]
        assert sorted(seen) == list(range(24))
        for same_step in zip(*ranks, strict=True):
            assert len({len(fetched.batches) for fetched in same_step}) == 1


def test_a_plan_is_entered_anywhere(tmp_path: Path, processor: Any) -> None:
    write_records(tmp_path)
    records = record_set(tmp_path, processor)
    plan = plan_of(records.measure()[0])
    steps = list(plan.steps())
    assert len(steps) == plan.total_steps() == plan.steps_in(0) + plan.steps_in(1)
    assert list(plan.steps(1, 1)) == steps[plan.steps_in(0) + 1 :]
    assert plan_of(plan.measured, max_steps=3).total_steps() == 3


def test_nothing_usable_is_an_error() -> None:
    nothing = Measured(np.zeros((2, 3), dtype=np.int32), ["", ""], np.array([2]))
    with pytest.raises(OmniTuneError, match="no usable record"):
        plan_of(nothing)


def test_every_record_comes_once_an_epoch_though_the_number_of_ranks_changes(tmp_path: Path, processor: Any) -> None:
    write_records(tmp_path, train=40)
    records = record_set(tmp_path, processor)
    measured, _ = records.measure()
    plan = plan_of(measured)
    seen: list[list[int]] = [[], []]
    position = (0, 0)
    for ranks, steps in ((2, 2), (1, 1), (3, 3), (2, 100)):  # stopped after so many steps, resumed on other ranks
        loaders = [
            iter(StepLoader(plan, records, rank=rank, world_size=ranks, epoch=position[0], step_in_epoch=position[1]))
            for rank in range(ranks)
        ]
        for _, fetched in zip(range(steps), zip(*loaders, strict=True), strict=False):
            for share in fetched:
                seen[share.epoch] += [record for batch in share.batches for record in batch.records]
            position = (fetched[0].epoch, fetched[0].step_in_epoch + 1)
    assert plan.steps_in(0) > 3
    assert [sorted(of_epoch) for of_epoch in seen] == [list(range(40))] * 2


def test_a_weight_so_low_that_no_record_is_taken_is_refused() -> None:
    lengths = np.full((20, 3), 10, dtype=np.int32)
    measured = Measured(lengths, [""] * 20, np.array([20]))
    with pytest.raises(OmniTuneError, match=r"data\.train\[0\]\.weight is 0\.02, .* none of its 20 records"):
        StepPlan(measured, [0.02], LIMITS, packs_per_step=1, seed=0, epochs=1, max_steps=None)
    plan = StepPlan(measured, [0.05], LIMITS, packs_per_step=1, seed=0, epochs=1, max_steps=None)
    assert [len(pack) for pack in plan.epoch(0)] == [1]
