"""A model folder in transformers' own class, for comparisons."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from train.modules.packed import PackedModel
from train.schema import Batch

Logits = Callable[[Batch], Tensor]
"""The logits (T, V) of a batch of one sample."""


def causal_logits(folder: Path) -> Logits:
    """Those of the class that `AutoModelForCausalLM` takes, in fp32: stock, or one of ours that we have registered."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    if isinstance(model, PackedModel):
        return model.logits
    return lambda batch: model(batch.input_ids[None]).logits[0]
