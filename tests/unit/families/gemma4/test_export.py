"""Exports of a folder as published: what is trained changes, all else is carried, transformers' own model loads it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.families.conversations import MIXED, packed
from tests.unit.families.gemma4.builders import TINY, write_model
from train.export.model_folder import export, write_random_model
from train.export.shards import StoredTensors
from train.families.gemma4 import GEMMA4
from train.families.gemma4.stock import stock_inputs
from train.families.registry import find
from train.modules.adapters import LoraSettings, add_adapters
from train.modules.trainable import canonical_name, is_adapter, module_of

LORA = LoraSettings(GEMMA4.lora_targets, rank=4, alpha=8, dropout=0.0)
LEARNING = sorted(GEMMA4.modules - {"per_layer_table"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, with the keys and values of layers that have none, which the published files hold."""
    torch.manual_seed(0)
    folder = write_model(tmp_path_factory.mktemp("published") / "model")
    file = folder / "model.safetensors"
    stored = {name: value.bfloat16() for name, value in load_file(file).items()}
    assert "lm_head.weight" not in stored
    assert "model.language_model.layers.4.self_attn.k_proj.weight" not in stored
    for number in (4, 5):
        stored[f"model.language_model.layers.{number}.self_attn.k_proj.weight"] = torch.randn(8, 8).bfloat16()
    save_file(stored, file, metadata={"format": "pt"})
    return folder


def test_a_random_model_knows_all_ends_of_an_answer(tmp_path: Path) -> None:
    write_random_model(TINY, tmp_path / "random", seed=0)
    wanted = json.loads((TINY / "generation_config.json").read_text())["eos_token_id"]
    assert len(wanted) == 2
    assert GEMMA4.load_model(tmp_path / "random").generation_config.eos_token_id == wanted


def learned(base: Path, lora: LoraSettings | None) -> dict[str, Tensor]:
    """Values as after training: all but the table's, or their adapters."""
    model = GEMMA4.load_model(base, dtype=torch.float32)
    if lora:
        model = add_adapters(model, GEMMA4.rules, lora)
    torch.manual_seed(1)
    return {
        canonical_name(name): value.detach() + 0.02 * torch.randn_like(value)
        for name, value in model.named_parameters()
        if (is_adapter(name) if lora else module_of(name, GEMMA4.rules) in LEARNING)
    }


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_transformers_loads_an_export_whole_and_computes_the_same(
    lora: LoraSettings | None, base: Path, tmp_path: Path
) -> None:
    processor = GEMMA4.load_processor(base)
    samples = [processor.encode(one) for one in MIXED]
    folder = export(base, learned(base, lora), tmp_path / "export", step=1, batch=packed(samples), lora=lora)
    assert json.loads((folder / "export.json").read_text())["ok"]
    assert find(folder) is GEMMA4
    before, after = StoredTensors(base), StoredTensors(folder)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        module = module_of(key, GEMMA4.rules)
        if module == "per_layer_table" or ".layers.4.self_attn.k_proj" in key or key.endswith(("_min", "layer_scalar")):
            assert after[key].equal(value), key
    for name in ("config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    ours = GEMMA4.load_model(folder, dtype=torch.float32).eval()
    stock = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = ours.logits(packed(samples)).split([len(sample.input_ids) for sample in samples])
        for sample, mine in zip(samples, logits, strict=True):
            theirs = stock(**stock_inputs(sample)).logits[0]
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)
    if lora:
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
