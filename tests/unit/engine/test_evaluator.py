"""How an evaluation shares out its prompts."""

import numpy as np

from train.data.plan import Limits
from train.engine.evaluator import prompt_batches


def test_a_batch_of_prompts_keeps_to_the_limits_of_a_pack() -> None:
    """Tokens count as padded to the longest of the batch."""
    limits = Limits(100, {"image": 50, "audio": 40})
    lengths = np.array(
        [
            (30, 0, 0),
            (10, 0, 0),
            (25, 0, 0),  # 10, 25, 30, 31: four of 31 are more than 100
            (31, 20, 0),
            (32, 30, 0),
            (33, 1, 0),  # 20 + 30 + 1 patches are more than 50
            (34, 0, 40),
            (36, 0, 1),  # 41 frames
            (400, 900, 0),  # over the limits, alone
        ],
        dtype=np.int32,
    )
    assert prompt_batches(range(9), lengths, limits, 32) == [[1, 2, 0], [3, 4], [5, 6], [7], [8]]
    assert prompt_batches(range(9), lengths, limits, 2) == [[1, 2], [0, 3], [4, 5], [6], [7], [8]]
    assert prompt_batches([], lengths, limits, 2) == []
