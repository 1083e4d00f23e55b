"""Small models of the family with every parameter random."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.builders import randomize
from tests.runs import ROOT
from train.export.model_folder import copy_side_files
from train.families.gemma4.config import Gemma4Config
from train.families.gemma4.model import Gemma4ForConditionalGeneration

TINY = ROOT / "data" / "tiny_gemma4"


def write_model(folder: Path, *, image_places: int = 9, head_dim: int = 64, **text: Any) -> Path:
    """A model folder whose weights are large enough that a mistake shows; `text` changes text_config."""
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"] |= {"global_head_dim": head_dim, "sliding_window": 16} | text
    config["vision_config"] |= {"standardize": True}
    model = Gemma4ForConditionalGeneration(Gemma4Config.from_dict(config))
    randomize(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("_min", "_max")):  # bounds that cut off some of what passes
                buffer.fill_(-1.5 if name.endswith("_min") else 1.2)
            elif name.endswith(("layer_scalar", "std_scale", "std_bias")):
                buffer.copy_(0.7 + 0.3 * torch.rand_like(buffer))
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):  # else attention is so sharp that rounding grows
                parameter.mul_(0.15)
        model.lm_head.weight.mul_(2.2)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()  # which knows one end of an answer
    copy_side_files(TINY, folder)
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["max_soft_tokens"] = image_places
    file.write_text(json.dumps(settings))
    return folder
