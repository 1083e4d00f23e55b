"""Predicted work against what torch counts, and sizes at the published ones on the meta device."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.families.gemma4.builders import TINY
from train.families.gemma4 import GEMMA4
from train.families.gemma4.config import Gemma4Config
from train.families.gemma4.flops import IMAGE_PATCHES, gemma4_flops
from train.families.gemma4.model import Gemma4ForConditionalGeneration
from train.modules.trainable import module_of

E2B = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_key_value_heads": 1}
E2B |= {"layer_types": 7 * [*4 * ["sliding_attention"], "full_attention"], "num_kv_shared_layers": 20}
E2B |= {"use_double_wide_mlp": True, "final_logit_softcapping": 30.0}


def counted(run: Callable[[], object]) -> int:
    # the counter knows no attention kernel of the CPU's, and the products that it is made of
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def e2b() -> Gemma4ForConditionalGeneration:
    with torch.device("meta"):
        return Gemma4ForConditionalGeneration(Gemma4Config(text_config=E2B))


def test_the_parts_have_the_published_sizes(e2b) -> None:
    sizes = dict.fromkeys(GEMMA4.modules, 0)
    for name, parameter in e2b.named_parameters():
        sizes[module_of(name, GEMMA4.rules)] += parameter.numel()
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {
        "vision_encoder": 167,
        "vision_proj": 1,
        "audio_encoder": 305,
        "audio_proj": 2,
        "llm": 2280,
        "per_layer_table": 2349,
    }


def test_the_work_of_the_language_model_is_what_torch_counts(e2b) -> None:
    flops = gemma4_flops(e2b, tuned=[])
    words, table = torch.zeros(1, 1024, 1536, device="meta"), torch.zeros(1, 1024, 35, 256, device="meta")
    # torch counts attention over all pairs, we count the causal half, and of sliding layers the window
    full, sliding = flops.token_squared * 1024**2, 4 * 28 * 8 * 256 * 1024 * (1024 - 512)
    predicted = flops.of(np.array([[1024, 0, 0]]))[0] + full + sliding
    counts = counted(lambda: e2b.llm.model(inputs_embeds=words, per_layer_inputs=table))
    assert predicted == pytest.approx(counts, rel=0.02)


def test_the_work_of_the_towers_is_what_torch_counts() -> None:
    tiny = GEMMA4.random_model(TINY, seed=0)
    images, sound = gemma4_flops(tiny, tuned=[]).of(np.array([[0, 1296, 0], [0, 0, 2400]]))
    pixels, mel = torch.zeros(1296, 432, dtype=torch.uint8), torch.zeros(2400, 128)
    images -= 4 * (IMAGE_PATCHES - 1296) * 96 * 3 * 1296
    assert images == pytest.approx(counted(lambda: tiny.towers["image"](pixels, torch.tensor([[36, 36]]))), rel=0.02)
    assert sound == pytest.approx(counted(lambda: tiny.towers["audio"](mel, torch.tensor([2400]))), rel=0.05)


def test_the_tiny_model_has_all_that_the_published_ones_have() -> None:
    text = json.loads((TINY / "config.json").read_text())["text_config"]
    shared = text["layer_types"][-text["num_kv_shared_layers"] :]
    assert set(shared) == set(text["layer_types"]) == {"sliding_attention", "full_attention"}
    assert text["hidden_size_per_layer_input"]
    assert text["final_logit_softcapping"]
