"""The rule list decides what learns; a parameter without a rule is an error."""

import pytest
from torch import nn

from train.errors import OmniTuneError
from train.families.megrezo import MEGREZO
from train.modules.trainable import (
    FROZEN,
    canonical_name,
    choose_trainable,
    is_adapter,
    module_of,
    parameter_groups,
)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("llm.lm_head.weight", "llm"),
        ("vision.vpm.post_layernorm.bias", "vision_encoder"),
        ("vision.resampler.query", "vision_proj"),
        ("audio.audio.conv1.weight", "audio_encoder"),
        ("audio.audio.ln_post.weight", "audio_encoder"),
        ("audio.audio.proj.weight", "audio_proj"),
        ("audio.audio.audio_bos_eos_token.weight", "audio_proj"),
        ("audio.audio.positional_embedding", FROZEN),
        ("base_model.model.llm.model.layers.0.self_attn.q_proj.lora_A.default.weight", "llm"),
        ("module.base_model.model.vision.resampler.modules_to_save.default.query", "vision_proj"),
    ],
)
def test_each_parameter_has_its_module(name: str, module: str) -> None:
    assert module_of(name, MEGREZO.rules) == module


def test_no_rule_is_an_error() -> None:
    with pytest.raises(OmniTuneError, match=r"'video\.weight'"):
        module_of("video.weight", MEGREZO.rules)


def test_names_lose_what_peft_put_around_them() -> None:
    name = "base_model.model.llm.model.layers.0.mlp.up_proj.base_layer.weight"
    assert canonical_name(name) == "llm.model.layers.0.mlp.up_proj.weight"
    assert not is_adapter(name)
    assert is_adapter("base_model.model.llm.model.layers.0.mlp.up_proj.lora_B.default.weight")


def test_groups_by_module_and_decay() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    rules = [("a.*", "one"), ("b.*", "two"), ("c.*", FROZEN)]
    choose_trainable(model, rules, tuned=["one", "two"])
    assert not model["c"].weight.requires_grad
    groups = parameter_groups(model, rules, rates={"one": 0.1, "two": 0.2}, adapter_rate=0.0, weight_decay=0.3)
    assert [(group.label, group.lr, group.weight_decay) for group in groups] == [
        ("one", 0.1, 0.3),
        ("one", 0.1, 0.0),
        ("two", 0.2, 0.3),
        ("two", 0.2, 0.0),
    ]
