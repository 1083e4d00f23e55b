"""Whether a written model folder computes what was trained: logits compared in float32."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.families import Family
from train.inference.shards import stored_dtypes
from train.modules.adapters import LoraSettings, add_adapters, load_trained, merge
from train.schema import Batch

TOLERANCE = 1e-4
"""How far logits in float32 may differ because sums are taken in another order."""

RELATIVE_TOLERANCE = 2e-5
"""The same as a share of the largest logit, which decides above 5. Measured: 5e-6 over ten layers of the published
size, with logits up to 40, between LoRA beside the weights and merged."""


@torch.no_grad()
def verify(
    family: Family,
    base: Path,
    trained: Mapping[str, Tensor],
    exported: Path,
    batch: Batch,
    lora: LoraSettings | None,
) -> dict[str, Any]:
    """The largest differences between an export and the trained model, and how large they may be.

    The trained model is the base in float32 with the trained values put in, adapters beside the weights: none of the
    export's ways. What the export's dtype does is measured on it: merged, and its weights rounded to that dtype.

    Runs on the CPU, and holds one model at a time.
    """
    dtypes = stored_dtypes(exported)
    model = family.load_model(base, dtype=torch.float32)
    if lora:
        model = add_adapters(model, family.rules, lora)
    load_trained(model, trained)
    expected = _logits(model.get_base_model() if lora else model, batch)
    rounding = {"logits": 0.0, "log_probabilities": 0.0}
    if set(dtypes.values()) != {torch.float32}:
        merged = merge(model) if lora else model
        exact = _logits(merged, batch)
        for name, parameter in merged.named_parameters(remove_duplicate=False):
            parameter.copy_(parameter.to(dtypes.get(name, torch.float32)))
        rounding = _differences(_logits(merged, batch), exact)
    del model
    difference = _differences(_logits(family.load_model(exported, dtype=torch.float32), batch), expected)
    stored = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))
    order = max(TOLERANCE, RELATIVE_TOLERANCE * float(expected.abs().max()))
    tolerance = {name: order + rounded for name, rounded in rounding.items()}
    return {
        "mode": "lora, merged" if lora else "full",
        "dtype": stored,
        "records": len(batch.records),
        "difference": difference,
        "tolerance": tolerance,
        "reason": f"{order:.1g} for float32 sums in another order, and what storing the trained model's weights as "
        f"{stored} changes in its own logits and log-probabilities",
        "ok": all(difference[name] <= tolerance[name] for name in difference),
        "versions": {package: version(package) for package in ("torch", "transformers", *(["peft"] if lora else []))},
    }


def _logits(model: Any, batch: Batch) -> Tensor:
    return model.eval().logits(batch).float()


def _differences(logits: Tensor, expected: Tensor) -> dict[str, float]:
    """The largest difference of any token; NaN, which is within no tolerance, where one of them is not finite."""
    log_probabilities = logits.log_softmax(-1) - expected.log_softmax(-1)
    return {
        "logits": float((logits - expected).abs().max()),
        "log_probabilities": float(log_probabilities.abs().max()),
    }
