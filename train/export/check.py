"""Whether a written model folder is what was trained: its tensors, and its logits in float32, in little memory.

Three things together leave no room for a fault. Each adapter merged into its layer computes what it computed beside
it. Each stored tensor is, bit for bit, the merged or trained one in the stored dtype. And the written folder's logits
are those of the trained model, but for what storing in that dtype changes.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from train.export.shards import StoredTensors
from train.export.streamed import names_of_weights, stream, weights_of
from train.families.family import Family
from train.modules.adapters import LoraSettings, adapter_parts, add_adapters, merged_weight
from train.modules.trainable import canonical_name
from train.schema import Batch

TOLERANCE = 1e-4
"""How far logits in float32 may differ because sums are taken in another order."""

RELATIVE_TOLERANCE = 2e-5
"""The same as a share of the largest logit, which decides above 5, and of an adapted layer's largest output. Measured:
5e-6 over ten layers of the published size, with logits up to 40, between LoRA beside the weights and merged."""

ROWS = 128
"""Tokens whose logits are compared, 63 MB of 122880 words: those whose hidden states differ most. And tokens that show
what an adapted layer computes."""

GPU_BYTES = 8 * 2**30
"""Free memory that makes a GPU worth using: the largest tensors of a 4B model three times over, and activations."""

_CHUNK = 16
"""Tokens whose logits are compared at one time."""


@torch.no_grad()
def verify(
    family: Family,
    base: Path,
    trained: Mapping[str, Tensor],
    exported: Path,
    batch: Batch,
    lora: LoraSettings | None,
) -> dict[str, Any]:
    """What differs between an export and the trained model, and whether that may be.

    The trained model is the base in float32 with the trained values put in, adapters beside the weights: none of the
    export's ways. Holds one layer's weights at a time. Logits run on the GPU where one is there and free, else on the
    CPU.
    """
    expected = _Expected(family, base, trained, lora)
    wrong = [*_wrong_tensors(expected, exported), *_wrong_in_adapter(exported, trained)]
    report: dict[str, Any]
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > GPU_BYTES:
        try:
            report = _compare(family, expected, exported, batch, torch.device("cuda"))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            report = _compare(family, expected, exported, batch, torch.device("cpu"))
    else:
        report = _compare(family, expected, exported, batch, torch.device("cpu"))
    dtypes = {tensor.dtype for tensor in expected.stored.values() if tensor.is_floating_point()}
    stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    order = max(TOLERANCE, RELATIVE_TOLERANCE * report.pop("largest"))
    may_differ = all(isfinite(figure) for figure in report["difference"].values())
    if dtypes == {torch.float32}:
        may_differ = all(figure <= order for figure in report["difference"].values())
    return {
        "mode": "lora, merged" if lora else "full",
        "dtype": stored,
        "records": len(batch.records),
        "tokens": len(batch.input_ids),
        **report,
        "tolerance": {"logits": order, "merging": RELATIVE_TOLERANCE},
        "reason": f"{order:.1g} for float32 sums in another order; beyond it, what storing weights as {stored} changes",
        "wrong": wrong,
        "ok": not wrong and may_differ and report["merging"] <= RELATIVE_TOLERANCE,
        "versions": {package: version(package) for package in ("torch", "transformers", *(["peft"] if lora else []))},
    }


class _Expected:
    """The trained model's weights by canonical name, read from the base and the checkpoint when asked for."""

    def __init__(self, family: Family, base: Path, trained: Mapping[str, Tensor], lora: LoraSettings | None):
        self.base, self.trained, self.lora = base, trained, lora
        self.stored = StoredTensors(base)
        skeleton = family.skeleton(base)
        self.names, self._keys = names_of_weights(skeleton), weights_of(base, skeleton)
        self._adapters = {f"{layer}.weight": parts for layer, parts in adapter_parts(trained).items()}

    def beside(self, name: str) -> Tensor:
        """With adapters apart."""
        return self.trained[name] if name in self.trained else self.stored[self._keys[name]]

    def merged(self, name: str) -> Tensor:
        """With adapters merged."""
        if name not in self._adapters:
            return self.beside(name)
        assert self.lora
        parts = {part: self.trained[whole] for part, whole in self._adapters[name].items()}
        return merged_weight(self.beside(name), parts, self.lora)

    def as_stored(self, key: str) -> Tensor:
        """What an export holds under a key."""
        name = self.names.get(key)
        before = self.stored[key]
        is_changed = name in self.trained or name in self._adapters
        return self.merged(name).to(before.dtype) if name and is_changed else before


def _wrong_tensors(expected: _Expected, exported: Path) -> list[str]:
    """The keys under which an export holds other bits than it should, lacks a tensor, or has one too many."""
    written = StoredTensors(exported)
    return [
        key
        for key in sorted(expected.stored.keys() | written.keys())
        if key not in expected.stored
        or key not in written
        or not _have_same_bits(written[key], expected.as_stored(key))
    ]


def _have_same_bits(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and a.flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


def _compare(family: Family, expected: _Expected, exported: Path, batch: Batch, device: torch.device) -> dict[str, Any]:
    """The largest differences in logits, and of an adapted layer's output the merged from the unmerged one."""
    with _exact_products():
        merging: list[float] = []
        skeleton = family.skeleton(expected.base)
        if expected.lora:
            with_adapters = add_adapters(skeleton, family.rules, expected.lora)
            stream(with_adapters, expected.beside, device)
            _probe_merging(with_adapters, expected, merging)
        else:
            stream(skeleton, expected.beside, device)
        written = family.skeleton(exported)
        keys, tensors = weights_of(exported, written), StoredTensors(exported)
        stream(written, lambda name: tensors[keys[name]], device)
        models: list[Any] = [written.eval(), skeleton.eval()]
        hidden = [model.hidden_states(batch.to(device)) for model in models]
        rows = (
            (hidden[0] - hidden[1]).nan_to_num(nan=torch.inf).abs().amax(dim=1).topk(min(ROWS, len(hidden[0]))).indices
        )
        logits = [model.get_output_embeddings()(states[rows]) for model, states in zip(models, hidden, strict=True)]
    return {
        "device": device.type,
        "difference": _differences(*logits),
        "merging": max(merging, default=0.0),
        "largest": float(logits[1].abs().max()),
    }


def _probe_merging(model: nn.Module, expected: _Expected, found: list[float]) -> None:
    """Note, while a model with adapters runs, how far each adapted layer's output is from that of its merged weight.

    found: for each layer the largest difference as a share of the largest output.
    """

    def compare(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, *, name: str) -> None:
        rows = slice(-ROWS, None)
        given, beside = inputs[0].flatten(0, -2)[rows], output.flatten(0, -2)[rows]
        bias = f"{name}.bias"
        merged = F.linear(given, expected.merged(f"{name}.weight").to(given))
        if bias in expected.names:
            merged = merged + expected.beside(bias).to(given)
        found.append(float((merged - beside).abs().max() / beside.abs().max()))

    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            layer.register_forward_hook(partial(compare, name=canonical_name(name)))


@contextmanager
def _exact_products() -> Iterator[None]:
    """float32 products in float32 on a GPU too, convolutions among them, which cuDNN would do in TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _differences(logits: Tensor, expected: Tensor) -> dict[str, float]:
    """The largest difference of any token; NaN, which is within no tolerance, where one of them is not finite."""
    found = [
        torch.stack([(a - b).abs().max(), (a.log_softmax(-1) - b.log_softmax(-1)).abs().max()])
        for a, b in zip(logits.split(_CHUNK), expected.split(_CHUNK), strict=True)
    ]
    of_logits, of_log_probabilities = torch.stack(found).amax(dim=0).tolist()
    return {"logits": of_logits, "log_probabilities": of_log_probabilities}


def _wrong_in_adapter(exported: Path, trained: Mapping[str, Tensor]) -> list[str]:
    """Trained parameters that the adapter beside an export, in float32, lacks or holds with other bits."""
    file = exported / "adapter" / "adapter_model.safetensors"
    if not file.is_file():
        return []
    with safe_open(file, "pt") as held:
        keys = {_plain(key): key for key in held.keys()}  # noqa: SIM118  (not a mapping)
        return [
            f"adapter: {name}"
            for name, value in trained.items()
            if _plain(name) not in keys or not _have_same_bits(held.get_tensor(keys[_plain(name)]), value)
        ]


def _plain(name: str) -> str:
    """A parameter's name without what peft adds to it in a model (the adapter's own name) or in a file."""
    return re.sub(r"^base_model\.model\.|\.default\b|\.weight$", "", name)
