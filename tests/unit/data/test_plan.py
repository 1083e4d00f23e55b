"""The plan: every record where it belongs, in packs that fit, the same for ever."""

import numpy as np
import pytest

from train.data.plan import Limits, assign, choose_records, pack, plan_epoch

LIMITS = Limits(100, {"image": 50, "audio": 1000})


def lengths_of(*tokens: int) -> np.ndarray:
    return np.array([[length, 0, 0] for length in tokens])


def test_best_fit_by_hand() -> None:
    lengths = lengths_of(60, 50, 40, 30, 10)
    # 60; 50 opens a second pack; 40 fits the fuller first one; 30 and 10 go to the second.
    assert pack([0, 1, 2, 3, 4], lengths, LIMITS)[0] == [[0, 2], [1, 3, 4]]


def test_patches_and_frames_bound_a_pack() -> None:
    lengths = np.array([[10, 30, 0], [10, 30, 0], [10, 0, 700], [10, 0, 700]])
    packs, _ = pack([0, 1, 2, 3], lengths, LIMITS)
    assert len(packs) == 2
    for held in packs:
        assert lengths[held, 1].sum() <= 50
        assert lengths[held, 2].sum() <= 1000


def test_open_packs_are_handed_on() -> None:
    packs, left = pack([0, 1, 2], lengths_of(98, 60, 10), LIMITS, keep_open=True)
    assert packs == [[0]]
    assert sorted(left) == [1, 2]


def test_an_epoch_takes_each_record_once_and_fills_packs() -> None:
    rng = np.random.default_rng(1)
    lengths = lengths_of(*rng.integers(5, 60, size=5000).tolist())
    packs = plan_epoch(lengths, [np.arange(5000)], [1.0], LIMITS, seed=0, epoch=0)
    assert sorted(record for held in packs for record in held) == list(range(5000))
    assert all(lengths[held, 0].sum() <= 100 for held in packs)
    assert lengths[:, 0].sum() / (100 * len(packs)) > 0.97


def test_the_plan_is_a_function_of_seed_and_epoch() -> None:
    lengths = lengths_of(*([30] * 50))
    records = [np.arange(50)]
    first = plan_epoch(lengths, records, [1.0], LIMITS, seed=0, epoch=0)
    assert first == plan_epoch(lengths, records, [1.0], LIMITS, seed=0, epoch=0)
    assert first != plan_epoch(lengths, records, [1.0], LIMITS, seed=0, epoch=1)
    assert first != plan_epoch(lengths, records, [1.0], LIMITS, seed=1, epoch=0)


@pytest.mark.parametrize(("weight", "times"), [(1.0, [1] * 10), (2.0, [2] * 10)])
def test_whole_weights_take_every_record_that_often(weight: float, times: list[int]) -> None:
    chosen = choose_records([np.arange(10)], [weight], np.random.default_rng(0))
    assert np.bincount(chosen).tolist() == times


def test_a_half_is_fresh_every_epoch() -> None:
    halves = [choose_records([np.arange(100)], [0.5], np.random.default_rng([0, epoch])) for epoch in (0, 1)]
    assert [len(set(half.tolist())) for half in halves] == [50, 50]
    assert set(halves[0].tolist()) != set(halves[1].tolist())


def test_assignment_gives_equal_counts_and_levels_the_work() -> None:
    assert assign([9.0, 8.0, 2.0, 1.0], 2) == [[0, 3], [1, 2]]
    assert sorted(len(packs) for packs in assign([1.0] * 5, 2)) == [2, 3]
    assert assign([1.0], 3) == [[0], [], []]


def test_assignment_exchanges_packs_where_the_dearest_first_goes_wrong() -> None:
    costs = [9.0, 8.0, 7.0, 6.0, 6.0, 2.0]
    ranks = assign(costs, 2)
    assert sorted(sum(costs[index] for index in rank) for rank in ranks) == [19, 19]
    assert [len(rank) for rank in ranks] == [3, 3]
