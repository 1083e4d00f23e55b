"""Samples laid end to end."""

import torch

from train.data.collate import collate
from train.schema import IGNORE_INDEX, Kind, Media, Sample

_ = IGNORE_INDEX


def sample(ids: list[int], labels: list[int], *, slices: int = 0, clip: int = 0, weight: float = 1.0) -> Sample:
    labels_T = torch.tensor(labels)
    media: dict[Kind, Media] = {}
    if slices:
        values = torch.full((4 * slices, 12), slices, dtype=torch.uint8)
        media["image"] = Media(values, torch.tensor([[2, 2]] * slices), torch.arange(slices))
    if clip:
        media["audio"] = Media(torch.full((clip, 3), float(clip)), torch.tensor([clip]), torch.tensor([1]))
    return Sample(
        input_ids=torch.tensor(ids),
        position_ids=torch.arange(len(ids)),
        labels=labels_T,
        loss_weights=(labels_T != IGNORE_INDEX).float() * weight,
        media=media,
    )


def test_two_samples_by_hand() -> None:
    first = sample([5, 6, 7], [_, 6, 7], slices=1)
    second = sample([8, 9, 10, 11], [_, _, 10, _], clip=4, weight=0.5)
    batch = collate([first, second], sources=[1, 0], records=[30, 40])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 7]
    assert batch.target_positions.tolist() == [0, 1, 4]
    assert batch.targets.tolist() == [6, 7, 10]
    assert batch.loss_weights.tolist() == [1.0, 1.0, 0.5]
    assert batch.target_sources.tolist() == [1, 1, 0]
    assert batch.media["image"].places.tolist() == [0]
    assert batch.media["audio"].places.tolist() == [4]
    assert batch.media["image"].sizes.tolist() == [[2, 2]]
    assert batch.media["audio"].sizes.tolist() == [4]
    assert batch.media["audio"].values.shape == (4, 3)
    assert batch.records == [30, 40]


def test_where_nothing_is_learned_a_weightless_target_stands_in() -> None:
    for batch in (collate([], [], []), collate([sample([5, 6], [_, _])], [0], [0])):
        assert batch.target_positions.tolist() == [0]
        assert batch.loss_weights.tolist() == [0.0]
