"""Which records share a pack, in which order, and which rank computes which pack.

Two pure functions. `plan_epoch` is a function of (lengths, weights, limits, seed, epoch);
`assign` of (costs of a step's packs, world size). Neither knows of workers, ranks or stops.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import ge, sub

import numpy as np

from train.schema import KINDS, Kind

WINDOW = 2048
"""Records that are packed together: large enough to fill packs, small enough that shuffling survives."""


LONG = 0.25
"""Share of a pack above which a record is placed before the others."""


@dataclass(frozen=True)
class Limits:
    """What a pack may hold."""

    tokens: int
    units: Mapping[Kind, int]
    """of each kind of media"""

    def row(self) -> tuple[int, ...]:
        """Tokens, then the units of each of KINDS."""
        return (self.tokens, *(self.units[kind] for kind in KINDS))


@dataclass(frozen=True)
class Speeds:
    """At which speed the clips of each record run in each epoch, and how long that makes the records.

    factors: all speeds, the first is 1.
    lengths: int (factors, records, 1 + kinds): the records' lengths at each; 0 tokens: not usable at that one.
    drawn_from: for each source, the end of its records and the factors, by index, that are drawn for them.
    """

    factors: Sequence[float]
    lengths: np.ndarray
    drawn_from: Sequence[tuple[int, Sequence[int]]]
    seed: int

    def drawn(self, epoch: int) -> np.ndarray:
        """int (records,): the index of each record's factor; that of 1 where it is not usable at the one drawn."""
        records = np.arange(self.lengths.shape[1])
        share = np.random.default_rng([self.seed, epoch, len(self.factors)]).random(len(records))
        chosen = np.zeros(len(records), dtype=np.int64)
        begin = 0
        for end, factors in self.drawn_from:
            choice = (share[begin:end] * len(factors)).astype(np.int64)
            chosen[begin:end] = np.asarray(factors, dtype=np.int64)[choice]
            begin = end
        return np.where(self.lengths[chosen, records, 0] > 0, chosen, 0)

    def lengths_in(self, epoch: int) -> np.ndarray:
        """The lengths of an epoch's records."""
        return self.lengths[self.drawn(epoch), np.arange(self.lengths.shape[1])]


def choose_records(records: Sequence[np.ndarray], weights: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Indices of an epoch's records, shuffled: each of source s's `records[s]` `weights[s]` times.

    The whole part of a weight takes every record; the rest takes a fresh random share of them.
    """
    chosen = []
    for of_source, weight in zip(records, weights, strict=True):
        whole, rest = divmod(weight, 1)
        chosen += [of_source] * int(whole)
        chosen.append(rng.choice(of_source, size=round(rest * len(of_source)), replace=False))
    order = np.concatenate(chosen)
    rng.shuffle(order)
    return order


def plan_epoch(
    lengths: np.ndarray,
    records: Sequence[np.ndarray],
    weights: Sequence[float],
    limits: Limits,
    *,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """The packs of an epoch in the order in which they are trained on.

    lengths: int (records, 1 + kinds): a row of `Lengths` for each record.
    records: for each source, the indices of its usable records.
    """
    rng = np.random.default_rng([seed, epoch])
    order = choose_records(records, weights, rng)
    packs: list[list[int]] = []
    carried: list[int] = []
    for start in range(0, len(order), WINDOW):
        window = carried + order[start : start + WINDOW].tolist()
        filled, carried = pack(window, lengths, limits, keep_open=start + WINDOW < len(order))
        packs += [filled[i] for i in rng.permutation(len(filled))]
    return packs


def pack(
    records: Sequence[int], lengths: np.ndarray, limits: Limits, *, keep_open: bool = False
) -> tuple[list[list[int]], list[int]]:
    """Best-fit packs of the records, and the records left for the next window.

    A record goes into the fullest pack that it fits: first the long ones, longest first, then the
    rest in the order given, so that a pack's records are a random choice and not all of one length.
    With `keep_open`, packs under 97 % of the tokens are dissolved again, for the next window to fill.
    """
    size = {record: tuple(int(x) for x in lengths[record]) for record in records}
    long = [record for record in records if size[record][0] > LONG * limits.tokens]
    short = [record for record in records if size[record][0] <= LONG * limits.tokens]
    ordered = sorted(long, key=lambda record: -size[record][0]) + short
    packs: list[list[int]] = []
    room: list[list[int]] = []
    by_room: list[tuple[int, int]] = []
    for record in ordered:
        tokens, *units = size[record]
        for place in range(bisect_left(by_room, (tokens, -1)), len(by_room)):
            _, index = by_room[place]
            if all(map(ge, room[index][1:], units)):
                del by_room[place]
                break
        else:
            index = len(packs)
            packs.append([])
            room.append(list(limits.row()))
        packs[index].append(record)
        room[index] = list(map(sub, room[index], size[record]))
        insort(by_room, (room[index][0], index))
    if not keep_open:
        return packs, []
    is_full = [room[index][0] <= 0.03 * limits.tokens for index in range(len(packs))]
    left = [record for full, held in zip(is_full, packs, strict=True) if not full for record in held]
    if not any(is_full):  # a window that fills nothing would be carried for ever
        return packs, []
    return [held for full, held in zip(is_full, packs, strict=True) if full], left


def assign(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """The packs of a step (by index) that each rank computes, equally many on each, by predicted cost.

    The dearest pack first, to the rank with the least work that has a place left; then packs of the busiest
    rank are exchanged for others while that lowers its work. Where packs do not divide evenly, some ranks get
    one fewer: the loader fills up with packs of weight zero.
    """
    places = -(-len(costs) // world_size)
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    work = [0.0] * world_size
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = min((r for r in range(world_size) if len(ranks[r]) < places), key=lambda r: (work[r], r))
        ranks[rank].append(index)
        work[rank] += costs[index]
    while exchange := _best_exchange(costs, ranks, work):
        busiest, mine, other, theirs = exchange
        difference = costs[ranks[busiest][mine]] - costs[ranks[other][theirs]]
        ranks[busiest][mine], ranks[other][theirs] = ranks[other][theirs], ranks[busiest][mine]
        work[busiest] -= difference
        work[other] += difference
    return ranks


def _best_exchange(
    costs: Sequence[float], ranks: list[list[int]], work: list[float]
) -> tuple[int, int, int, int] | None:
    """(busiest rank, place in it, other rank, place in it) whose exchange leaves the least work on either of them.

    None where no exchange lowers the busiest rank's work by a thousandth: nothing goes on for ever over rounding.
    """
    busiest = max(range(len(ranks)), key=lambda rank: work[rank])
    least, best = work[busiest] * 0.999, None
    for other in range(len(ranks)):
        for mine, dear in enumerate(ranks[busiest]):
            for theirs, cheap in enumerate(ranks[other]):
                difference = costs[dear] - costs[cheap]
                higher = max(work[busiest] - difference, work[other] + difference)
                if higher < least:
                    least, best = higher, (busiest, mine, other, theirs)
    return best
