"""The plan of the real size, from its configuration alone: figures that another way of summing gave."""

import pytest
import torch

from tests.runs import ROOT
from train.commands.options import compose_options
from train.families.registry import find
from train.preflight.memory import measure_step
from train.preflight.plan import gpu_memory
from train.schema import Batch, Media

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

FOLDER = ROOT / "tests" / "published" / "megrez_3b_omni"
TOKENS, FIRST, LEARNED = 4096, 2248, 300
SLICES, QUERIES, CLIPS = 16, 64, (3000, 1080)


def heavy_pack() -> Batch:
    """Two records, each with 16 slices of 32×32 patches, and clips of 3,000 and 1,080 frames; 4,096 tokens."""
    starts, ends = (0, FIRST), (FIRST, TOKENS)
    images = [torch.arange(SLICES * QUERIES) + start + 5 for start in starts]
    clips = [torch.arange(frames // 4 + 2) + start + 1100 for start, frames in zip(starts, CLIPS, strict=True)]
    learned = torch.cat([torch.arange(end - LEARNED - 1, end - 1) for end in ends])
    return Batch(
        input_ids=torch.zeros(TOKENS, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(end - start) for start, end in zip(starts, ends, strict=True)]),
        cu_seqlens=torch.tensor([0, FIRST, TOKENS], dtype=torch.int32),
        target_positions=learned,
        targets=torch.zeros(len(learned), dtype=torch.int64),
        loss_weights=torch.ones(len(learned)),
        target_sources=torch.zeros(len(learned), dtype=torch.int64),
        media={
            "image": Media(
                torch.zeros(2 * SLICES * 32 * 32, 3 * 14**2, dtype=torch.uint8),
                torch.full((2 * SLICES, 2), 32),
                torch.cat(images),
            ),
            "audio": Media(torch.zeros(sum(CLIPS), 128), torch.tensor(CLIPS), torch.cat(clips)),
        },
        records=[0, 1],
    )


ADAPTERS_ALONE = ["+recipe=lora", "engine=none", "modules.tune_vision_proj=false", "modules.tune_audio_proj=false"]


@pytest.mark.parametrize(
    ("words", "gib"),
    [
        (["engine=zero2"], 65.5),
        (["engine=none"], 65.5 + 2 * 4.01e9 / 2**30),  # as much, with gradients of 4 bytes in place of 2
        (ADAPTERS_ALONE, 9.4),
        ([*ADAPTERS_ALONE, "run.activation_checkpointing=none"], 25.8),
    ],
)
def test_tensors_of_the_real_size(words: list[str], gib: float) -> None:
    options = compose_options(["model=megrez_3b_omni", f"model.path={FOLDER}", *words])[0]
    found = gpu_memory(options, measure_step(options, find(FOLDER), FOLDER, heavy_pack()), gpus=1)
    held = found.weights + found.optimizer + found.gradients + found.activations  # before DeepSpeed's update
    assert held == pytest.approx(gib, rel=0.03)
