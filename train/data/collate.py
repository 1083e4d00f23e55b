"""Samples of one pack, laid end to end: a Batch without padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.schema import IGNORE_INDEX, Batch, Sample


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

    def flat(name: str, dim: int = 0) -> Tensor:
        return torch.cat([getattr(sample, name) for sample in samples], dim)

    def places(name: str) -> Tensor:
        return torch.cat([getattr(sample, name) + start for sample, start in zip(samples, starts, strict=True)])

    return Batch(
        input_ids=flat("input_ids"),
        position_ids=torch.cat([torch.arange(int(length)) for length in lengths]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32),
        target_positions=positions,
        targets=targets,
        loss_weights=weights,
        target_sources=source_of_sample[torch.searchsorted(ends, positions, right=True)],
        patches=flat("patches"),
        slice_sizes=flat("slice_sizes"),
        image_places=places("image_places"),
        mel=flat("mel", dim=1),
        clip_frames=flat("clip_frames"),
        audio_places=places("audio_places"),
        records=list(records),
    )


def _empty() -> Batch:
    """A pack of weight zero: one token from which nothing is learned."""
    zero, none = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=zero,
        position_ids=zero,
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        target_positions=zero,
        targets=zero,
        loss_weights=torch.zeros(1),
        target_sources=zero,
        patches=torch.zeros(0, 0, dtype=torch.uint8),
        slice_sizes=torch.zeros(0, 2, dtype=torch.int64),
        image_places=none,
        mel=torch.zeros(0, 0),
        clip_frames=none,
        audio_places=none,
    )
