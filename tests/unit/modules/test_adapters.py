"""The LoRA family on a tiny model: its names and groups; 4-bit weights that evaluation leaves alone."""

import pytest
import torch
from torch import nn

from tests.builders import make_batch, mixed_samples, tiny_megrezo
from train.engine.state import size_of
from train.families.megrezo import MEGREZO
from train.modules.adapters import LoraSettings, add_adapters, quantize_linear_layers
from train.modules.trainable import choose_trainable, is_adapter, module_of, parameter_groups

QUERY = "base_model.model.llm.model.layers.0.self_attn.q_proj"


def settings(**changes) -> LoraSettings:
    return LoraSettings(targets={"llm": ("q_proj", "down_proj")}, rank=4, alpha=8.0, dropout=0.0, **changes)


def in_4bit(dtype: torch.dtype = torch.float32):
    model = tiny_megrezo().to(dtype)
    quantize_linear_layers(model, MEGREZO.rules, "llm", compute_dtype=dtype, device=torch.device("cpu"))
    return model


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_scale_of_rslora(use_rslora: bool, scale: float) -> None:
    model = add_adapters(tiny_megrezo(), MEGREZO.rules, settings(use_rslora=use_rslora))
    assert model.get_submodule(QUERY).scaling == {"default": scale}


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_begin_by_adding_nothing(start: bool | str, use_dora: bool) -> None:
    model = tiny_megrezo().eval()
    batch = make_batch(mixed_samples(model.config))
    with torch.no_grad():
        before = model.logits(batch)
        adapted = add_adapters(model, MEGREZO.rules, settings(init_lora_weights=start, use_dora=use_dora))
        after = adapted.get_base_model().logits(batch)
    assert adapted.get_submodule(QUERY).lora_A["default"].weight.abs().max() > 0
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("in_float32", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_adapters_beside_half_precision_weights(in_float32: bool, dtype: torch.dtype) -> None:
    model = add_adapters(tiny_megrezo().to(torch.bfloat16), MEGREZO.rules, settings(), in_float32=in_float32)
    assert {p.dtype for name, p in model.named_parameters() if is_adapter(name)} == {dtype}
    assert {p.dtype for name, p in model.named_parameters() if not is_adapter(name)} == {torch.bfloat16}


def test_doras_magnitudes_are_adapters_that_do_not_decay() -> None:
    model = add_adapters(tiny_megrezo(), MEGREZO.rules, settings(use_dora=True))
    choose_trainable(model, MEGREZO.rules, tuned=["llm"], adapted=["llm"])
    name = f"{QUERY}.lora_magnitude_vector.default.weight"
    magnitude = model.get_parameter(name)
    assert is_adapter(name)
    assert module_of(name, MEGREZO.rules) == "llm"
    groups = parameter_groups(model, MEGREZO.rules, rates={"llm": 1.0}, adapter_rate=0.1, weight_decay=0.3)
    found = {
        (group.label, group.lr, group.weight_decay): any(p is magnitude for p in group.parameters) for group in groups
    }
    assert found == {("llm.lora", 0.1, 0.3): False, ("llm.lora", 0.1, 0.0): True}


def test_4bit_takes_the_linear_layers_of_the_llm_but_the_head() -> None:
    plain, model = tiny_megrezo(), in_4bit()
    weights = dict(model.named_parameters())
    packed = {name for name, weight in weights.items() if weight.dtype == torch.uint8}
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(packed) == 2 * len(ends)
    assert all(name.startswith("llm.model.layers.") and name.split(".")[-2] in ends for name in packed)
    assert all(weights[name].equal(weight) for name, weight in plain.named_parameters() if name not in packed)
    query = weights["llm.model.layers.0.self_attn.q_proj.weight"]
    assert query.numel() == 64 * 64 // 2
    assert size_of(query) == 64 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_leaves_4bit_weights_alone(dtype: torch.dtype) -> None:
    """Left to itself, bitsandbytes repacks them on a CPU with AVX512-BF16, and cuts off the gradient."""
    layer = in_4bit(dtype).llm.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    before = layer.weight.data.clone()
    trained = layer.train()(x)
    with torch.no_grad():
        evaluated = layer.eval()(x.detach())
    assert evaluated.equal(trained)
    assert layer.weight.data.equal(before)
    layer.train()(x).sum().backward()
    assert isinstance(layer, nn.Linear)
    assert x.grad is not None
    assert x.grad.abs().max() > 0
