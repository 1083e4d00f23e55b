"""Predicted work against what torch counts, the language model at the size of Qwen2.5-Omni-7B on the meta device."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.families.qwen_omni.builders import TINY
from train.families.qwen_omni import QWEN_OMNI
from train.families.qwen_omni.config import QwenOmniConfig
from train.families.qwen_omni.flops import qwen_omni_flops
from train.families.qwen_omni.model import Qwen2_5OmniForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> Qwen2_5OmniForConditionalGeneration:
    with torch.device("meta"):
        return Qwen2_5OmniForConditionalGeneration(
            QwenOmniConfig(thinker_config={"vision_config": {"hidden_size": 1280}})
        )


def counted(run: Callable[[], object]) -> int:
    # the counter knows no attention kernel of the CPU's, and the products that it is made of
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_parameters_are_those_of_the_published_thinker(model) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_931_813_888


def test_the_work_of_the_language_model_is_what_torch_counts(model) -> None:
    flops = qwen_omni_flops(model, tuned=[])
    words = torch.zeros(1, 512, 3584, device="meta")
    # torch counts attention over all pairs, we count the causal half
    predicted = flops.of(np.array([[512, 0, 0]]))[0] + flops.token_squared * 512**2
    assert predicted == pytest.approx(counted(lambda: model.llm.model(inputs_embeds=words)), rel=0.02)


def test_the_work_of_the_towers_is_what_torch_counts() -> None:
    tiny = QWEN_OMNI.random_model(TINY, seed=0)
    images, sound = qwen_omni_flops(tiny, tuned=[]).of(np.array([[0, 1024, 0], [0, 0, 3000]]))
    pixels, mel = torch.zeros(1024, 588, dtype=torch.uint8), torch.zeros(3000, 128)
    assert images == pytest.approx(counted(lambda: tiny.towers["image"](pixels, torch.tensor([[32, 32]]))), rel=0.02)
    assert sound == pytest.approx(counted(lambda: tiny.towers["audio"](mel, torch.tensor([3000]))), rel=0.02)


def test_adapted_modules_take_two_passes_and_not_three(model) -> None:
    in_full, adapted = (qwen_omni_flops(model, ["llm"], adapted) for adapted in ([], ["llm"]))
    assert adapted.token == pytest.approx(in_full.token * 2 / 3)
