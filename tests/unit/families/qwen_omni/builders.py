"""Small models of the family with every parameter random."""

import json
from pathlib import Path

import torch
import transformers

from tests.builders import randomize
from tests.runs import ROOT
from train.export.model_folder import copy_side_files
from train.families.qwen_omni.config import QwenOmniConfig
from train.families.qwen_omni.model import Qwen2_5OmniForConditionalGeneration

TINY = ROOT / "data" / "tiny_qwen_omni"


def write_model(folder: Path, *, max_pixels: int = 300 * 300) -> Path:
    """A model folder: all four kinds of weights large enough that a mistake shows, images up to `max_pixels`."""
    model = Qwen2_5OmniForConditionalGeneration(QwenOmniConfig.from_pretrained(TINY))
    randomize(model)
    model.save_pretrained(folder)
    copy_side_files(TINY, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_pixels": max_pixels}))
    return folder


def write_published(folder: Path) -> Path:
    """A model folder as published: talker and vocoder beside the thinker, several shards, the thinker in bfloat16."""
    config = json.loads((TINY / "config.json").read_text())
    rope = {"rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default"}, "rope_theta": 1e6}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32, "hidden_size": 64}
    talker = sizes | rope | {"embedding_size": 128, "intermediate_size": 64, "num_key_value_heads": 1}
    dit = sizes | {"look_ahead_layers": [0], "look_backward_layers": [0], "emb_dim": 32, "enc_emb_dim": 16}
    dit |= {"enc_dim": 16, "enc_channels": [16] * 4 + [48], "enc_attention_channels": 8, "enc_se_channels": 8}
    model = transformers.Qwen2_5OmniForConditionalGeneration(
        transformers.Qwen2_5OmniConfig(
            thinker_config=config["thinker_config"],
            talker_config=talker,
            token2wav_config={"dit_config": dit, "bigvgan_config": {"upsample_initial_channel": 64}},
        )
    )
    randomize(model)
    model.thinker.bfloat16(), model.talker.bfloat16()
    model.save_pretrained(folder, max_shard_size="2MB")
    torch.save({}, folder / "spk_dict.pt")
    copy_side_files(TINY, folder)
    return folder
