"""MiniCPM's Llama form: the same function, and the way back."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.builders import randomize
from train.errors import CheckpointError
from train.export.convert import convert
from train.families.minicpm.conversion import llama_weights
from train.families.minicpm.model import MiniCPMConfig, MiniCPMForCausalLM
from train.families.registry import find

CONFIG = MiniCPMConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    dim_model_base=16,
)
PLAIN = {"num_hidden_layers": 4, "hidden_size": 64, "dim_model_base": 16, "scale_emb": 12, "scale_depth": 1.4}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiniCPM in several shards, with side files as published."""
    folder = tmp_path_factory.mktemp("native")
    torch.manual_seed(0)
    model = MiniCPMForCausalLM(CONFIG)
    randomize(model)
    model.save_pretrained(folder, max_shard_size="60KB")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    template = "{{ '<用户>' + message['content'].strip() + '<AI>' }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "LICENSE").write_text("theirs")
    return folder


@pytest.fixture(scope="module")
def llama_form(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    convert(native, "llama", folder / "out")
    return folder / "out"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("model.embed_tokens.weight", {"model.embed_tokens.weight": 12.0, "lm_head.weight": 0.25}),
        ("model.layers.3.self_attn.o_proj.weight", {"model.layers.3.self_attn.o_proj.weight": 0.7}),
        ("model.layers.0.mlp.down_proj.weight", {"model.layers.0.mlp.down_proj.weight": 0.7}),
        ("model.layers.0.mlp.up_proj.weight", {"model.layers.0.mlp.up_proj.weight": 1.0}),
        ("model.norm.weight", {"model.norm.weight": 1.0}),
        ("lm_head.weight", {}),
    ],
)
def test_the_scales_go_where_they_act(name: str, factors: dict[str, float]) -> None:
    made = llama_weights(name, torch.ones(2), PLAIN)
    assert {key: value.tolist() for key, value in made.items()} == {
        key: pytest.approx([factor] * 2) for key, factor in factors.items()
    }


def test_the_llama_form_computes_the_same(native: Path, llama_form: Path) -> None:
    assert find(llama_form).name == "minicpm-llama"
    stock = transformers.AutoModelForCausalLM.from_pretrained(llama_form)
    assert type(stock) is transformers.LlamaForCausalLM
    ids = torch.randint(0, 96, (2, 20))
    with torch.no_grad():
        mine = MiniCPMForCausalLM.from_pretrained(native)(input_ids=ids).logits
        assert mine.std() > 0.1
        assert (stock(input_ids=ids).logits - mine).abs().max() < 1e-5
    assert (llama_form / "LICENSE").read_text() == "theirs"
    assert "auto_map" not in json.loads((llama_form / "config.json").read_text())


def test_and_back(native: Path, llama_form: Path, tmp_path: Path) -> None:
    convert(llama_form, "minicpm", tmp_path / "back")
    before, after = weights(native), weights(tmp_path / "back")
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=0, rtol=3e-7, msg=name)
    assert find(tmp_path / "back").name == "minicpm"
    assert MiniCPMConfig.from_pretrained(tmp_path / "back").to_diff_dict() == CONFIG.to_diff_dict() | {
        "architectures": ["MiniCPMForCausalLM"],
        "dtype": "float32",
    }


def test_a_head_that_learned_apart_is_kept(llama_form: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "config.json").write_text((llama_form / "config.json").read_text())
    (trained / "tokenizer_config.json").write_text((llama_form / "tokenizer_config.json").read_text())
    changed = weights(llama_form)
    changed["lm_head.weight"][3] += 0.01
    save_file(changed, trained / "model.safetensors")
    convert(trained, "minicpm", tmp_path / "back")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(trained)(input_ids=ids).logits
        back = MiniCPMForCausalLM.from_pretrained(tmp_path / "back")(input_ids=ids).logits
    assert (back - expected).abs().max() < 1e-5


def test_what_cannot_be_converted_is_refused(native: Path, llama_form: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((native / "config.json").read_text())
    for folder, form, said in (
        (tmp_path, "llama", "lacks the weights 'model.safetensors'"),
        (llama_form, "llama", "is a minicpm-llama model, which has no form 'llama'; its forms: minicpm"),
    ):
        with pytest.raises(CheckpointError, match=said):
            convert(folder, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()
