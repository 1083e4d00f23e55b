"""Exports of a folder as published: talker and vocoder carried along, and transformers' own model loads it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from tests.unit.families.conversations import MIXED, packed
from tests.unit.families.qwen_omni.builders import write_published
from train.export.model_folder import export
from train.export.shards import StoredTensors, shards_of
from train.families.qwen_omni import QWEN_OMNI
from train.families.qwen_omni.stock import stock_inputs
from train.families.registry import find
from train.modules.adapters import LoraSettings, add_adapters
from train.modules.trainable import canonical_name, is_adapter, module_of

LORA = LoraSettings(QWEN_OMNI.lora_targets, rank=4, alpha=8, dropout=0.0)
MODULES = sorted(QWEN_OMNI.modules)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_published(tmp_path_factory.mktemp("published") / "model")


def learned(base: Path, modules: list[str], lora: LoraSettings | None) -> dict[str, Tensor]:
    """Values as after training: all of `modules`, or their adapters."""
    model = QWEN_OMNI.load_model(base, dtype=torch.float32)
    if lora:
        model = add_adapters(model, QWEN_OMNI.rules, lora)
    torch.manual_seed(1)
    return {
        canonical_name(name): value.detach() + 0.05 * torch.randn_like(value)
        for name, value in model.named_parameters()
        if (is_adapter(name) if lora else module_of(name, QWEN_OMNI.rules) in modules)
    }


@pytest.mark.parametrize("modules", [MODULES, ["audio_encoder"], ["vision_proj", "llm"]], ids=str)
def test_what_is_trained_changes_and_all_else_is_carried_bit_for_bit(
    modules: list[str], base: Path, tmp_path: Path
) -> None:
    batch = packed([QWEN_OMNI.load_processor(base).encode(one) for one in MIXED])
    folder = export(base, learned(base, modules, None), tmp_path / "export", step=1, batch=batch)
    assert json.loads((folder / "export.json").read_text())["ok"]
    before, after = StoredTensors(base), StoredTensors(folder)
    assert len(shards_of(base)) > 2
    assert [shard.name for shard in shards_of(folder)] == [shard.name for shard in shards_of(base)]
    assert before.keys() == after.keys()
    assert {key.split(".")[0] for key in after} == {"thinker", "talker", "token2wav"}
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        is_trained = key.startswith("thinker.") and module_of(key, QWEN_OMNI.rules) in modules
        assert after[key].equal(value) != is_trained, key
    for name in ("config.json", "preprocessor_config.json", "chat_template.jinja", "spk_dict.pt", "tokenizer.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert find(folder) is QWEN_OMNI


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_transformers_loads_an_export_whole_and_computes_the_same(
    lora: LoraSettings | None, base: Path, tmp_path: Path
) -> None:
    processor = QWEN_OMNI.load_processor(base)
    samples = [processor.encode(one) for one in MIXED]
    folder = export(base, learned(base, MODULES, lora), tmp_path / "export", step=1, batch=packed(samples), lora=lora)
    ours = QWEN_OMNI.load_model(folder, dtype=torch.float32).eval()
    stock = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    stored = StoredTensors(base)
    talker = dict(stock.talker.named_parameters())
    assert talker
    for name, value in talker.items():
        assert value.equal(stored[f"talker.{name}"].float())
    with torch.no_grad():
        logits = ours.logits(packed(samples)).split([len(sample.input_ids) for sample in samples])
        for sample, mine in zip(samples, logits, strict=True):
            theirs = stock.thinker.eval()(**stock_inputs(sample)).logits[0]
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    if lora:
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
