"""Predicted work against what torch counts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from train.families.megrezo.flops import megrezo_flops
from train.families.megrezo.model import MegrezO, MegrezOConfig


def forward_flops(model: MegrezO, run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_work_of_each_tower_is_what_torch_counts() -> None:
    """Full size on the meta device, forward only: an LLM row of 512 tokens."""
    with torch.device("meta"):
        model = MegrezO(MegrezOConfig())
        ids = torch.zeros(1, 512, dtype=torch.int64)
        counted = forward_flops(model, lambda: model.llm.model(inputs_embeds=torch.zeros(1, *ids.shape[1:], 2560)))
    flops = megrezo_flops(model, tuned=[])
    predicted = flops.of(np.array([[512, 0, 0]]))[0]
    # torch counts attention over all pairs, we count the causal half
    assert predicted + flops.token_squared * 512**2 == pytest.approx(counted, rel=0.02)


def test_learning_costs_three_forwards_and_passing_through_two() -> None:
    with torch.device("meta"):
        model = MegrezO(MegrezOConfig())
    resting = megrezo_flops(model, tuned=[])
    only_llm = megrezo_flops(model, tuned=["llm"])
    only_connector = megrezo_flops(model, tuned=["vision_proj"])
    assert only_llm.token == 3 * resting.token
    assert only_llm.unit["image"] == resting.unit["image"]
    assert only_connector.token == 2 * resting.token
    assert resting.unit["image"] < only_connector.unit["image"] < 2 * resting.unit["image"]


def test_a_record_is_the_sum_of_its_parts() -> None:
    with torch.device("meta"):
        model = MegrezO(MegrezOConfig())
    flops = megrezo_flops(model, tuned=["llm"])
    whole, text, images, sound = flops.of(np.array([[10, 20, 30], [10, 0, 0], [0, 20, 0], [0, 0, 30]]))
    assert whole == pytest.approx(text + images + sound)
