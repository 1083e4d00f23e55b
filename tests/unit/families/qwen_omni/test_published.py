"""The published folder, literally: taken as it is; a step is trained, and the export has its keys, shards and files."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.builders import randomize
from tests.runs import build_here, write_records
from tests.unit.families.conversations import MIXED
from tests.unit.families.published import PUBLISHED, add_tokenizer, changed
from train.export.shards import StoredTensors, shards_of
from train.families.qwen_omni import QWEN_OMNI
from train.families.registry import find

NAME = "qwen2_5_omni_7b"

TINY: dict[str, dict[str, Any]] = {
    "text_config": {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
    | {"num_attention_heads": 1, "num_key_value_heads": 1},
    "vision_config": {"depth": 2, "hidden_size": 64, "embed_dim": 64, "intermediate_size": 64, "num_heads": 2}
    | {"out_hidden_size": 128},
    "audio_config": {"d_model": 32, "encoder_attention_heads": 1, "encoder_ffn_dim": 32, "encoder_layers": 1}
    | {"num_hidden_layers": 1, "output_dim": 128},
}
TALKER = {"embedding_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
TALKER |= {"num_attention_heads": 1, "num_key_value_heads": 1}
DIT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32, "look_ahead_layers": [0]}
DIT |= {"look_backward_layers": [0], "emb_dim": 32, "enc_emb_dim": 16, "enc_dim": 16, "enc_channels": [16] * 4 + [48]}
DIT |= {"enc_attention_channels": 8, "enc_se_channels": 8}


def billions(module: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e9, 3)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this project says; transformers says more of a talker's ids, until a command quietens it."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("train")]


def test_it_has_the_published_parts(caplog: pytest.LogCaptureFixture) -> None:
    assert find(PUBLISHED / NAME) is QWEN_OMNI
    with caplog.at_level(logging.WARNING, logger="train"):
        thinker: Any = QWEN_OMNI.skeleton(PUBLISHED / NAME).thinker
    assert not told(caplog)
    connectors = [billions(thinker.visual.merger), billions(thinker.audio_tower.proj)]
    assert connectors == [0.045, 0.005]
    assert [round(billions(part), 2) for part in (thinker.visual, thinker.audio_tower)] == [0.68, 0.64]
    assert round(billions(thinker.model) + billions(thinker.lm_head), 2) == 7.62


def test_a_key_that_changes_nothing_is_still_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = changed(NAME, tmp_path, thinker_config__no_such_key=1)
    with caplog.at_level(logging.WARNING, logger="train"):
        QWEN_OMNI.config(folder)
    assert told(caplog) == [f"{folder / 'config.json'}: keys that change nothing here: thinker_config.no_such_key"]


def write_published(folder: Path) -> Path:
    """The published files with tiny sizes, and random weights as transformers' own class stores them."""
    changed(NAME, folder)
    model = add_tokenizer(folder / NAME)
    config = json.loads((model / "config.json").read_text())
    for part, sizes in TINY.items():
        config["thinker_config"][part] |= sizes
    config["talker_config"] |= TALKER
    made = json.loads(json.dumps(config))
    made["token2wav_config"] = {"dit_config": DIT, "bigvgan_config": {"upsample_initial_channel": 64}}
    stock = transformers.Qwen2_5OmniForConditionalGeneration(transformers.Qwen2_5OmniConfig(**made))
    randomize(stock)
    stock.thinker.bfloat16(), stock.talker.bfloat16()
    stock.save_pretrained(model, max_shard_size="40MB")
    (model / "generation_config.json").unlink()
    (model / "config.json").write_text(json.dumps(config, indent=2))
    return model


def test_it_is_trained_and_exported_with_its_keys_and_shards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = write_published(tmp_path)
    before = StoredTensors(model)
    assert {key.split(".")[0] for key in before} == {"thinker", "talker", "token2wav"}
    assert QWEN_OMNI.load_processor(model).encode(MIXED[3]).input_ids.max() == 151_655
    frozen = [f"modules.tune_{name}=false" for name in ("llm", "vision_encoder", "audio_encoder")]
    words = ["model=qwen_omni", f"model.path={model}", *frozen, *write_records(tmp_path, train=8), "data.eval=[]"]
    rate = ["modules.lr.vision_proj=0.01", "modules.lr.audio_proj=0.01", "optim.warmup_ratio=0"]
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        run = build_here([*words, *rate, "run.max_steps=1", f"run.dir={tmp_path / 'run'}"])
        run.trainer.fit()
        export = run.export()
    assert not caplog.records
    assert "[transformers]" not in capfd.readouterr().err
    assert [shard.name for shard in shards_of(export)] == [shard.name for shard in shards_of(model)]
    assert len(shards_of(export)) > 1
    after = StoredTensors(export)
    assert after.keys() == before.keys()
    changed_keys = {key for key in before if not after[key].equal(before[key])}
    assert {after[key].dtype for key in changed_keys} == {torch.bfloat16}
    parts = ("thinker.visual.merger.", "thinker.audio_tower.proj.")
    assert all(key.startswith(parts) for key in changed_keys)
    assert all(any(key.startswith(part) for key in changed_keys) for part in parts)
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "model.safetensors.index.json"):
        assert (export / name).read_bytes() == (model / name).read_bytes()
