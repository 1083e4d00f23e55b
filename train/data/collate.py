"""Samples of one pack, laid end to end: a Batch without padding."""

from collections.abc import Sequence

import torch

from train.schema import IGNORE_INDEX, KINDS, Batch, Media, Sample


def collate(samples: Sequence[Sample], sources: Sequence[int], records: Sequence[int]) -> Batch:
    """One flat Batch of the samples; `sources` and `records` say where each came from.

    A Batch always has at least one target: where nothing is learned (no samples at all, or prompts
    only) a target of weight zero stands in, so that every rank runs the same graph.
    """
    if not samples:
        return _empty()
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    ends = torch.cumsum(lengths, 0)
    starts = ends - lengths
    labels = torch.cat([sample.labels for sample in samples])
    learned = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    weights = torch.cat([sample.loss_weights for sample in samples])[learned]
    if len(learned) == 0:
        positions, targets, weights = (
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1),
        )
    else:
        positions, targets = learned - 1, labels[learned]
    source_of_sample = torch.tensor(sources, dtype=torch.int64)
    starting = list(zip(samples, starts.tolist(), strict=True))
    held = {kind: [(of.media[kind], start) for of, start in starting if kind in of.media] for kind in KINDS}
    return Batch(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        position_ids=torch.cat([sample.position_ids for sample in samples], dim=-1),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32),
        target_positions=positions,
        targets=targets,
        loss_weights=weights,
        target_sources=source_of_sample[torch.searchsorted(ends, positions, right=True)],
        media={kind: Media.joined(*zip(*found, strict=True)) for kind, found in held.items() if found},
        records=list(records),
    )


def _empty() -> Batch:
    """A pack of weight zero: one token from which nothing is learned."""
    zero = torch.zeros(1, dtype=torch.int64)
    return Batch(
        input_ids=zero,
        position_ids=zero,
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        target_positions=zero,
        targets=zero,
        loss_weights=torch.zeros(1),
        target_sources=zero,
    )
