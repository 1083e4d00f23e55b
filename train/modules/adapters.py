"""LoRA through peft: adapters onto our modules, into and out of a folder, merged; QLoRA's 4-bit weights.

peft takes seconds to import, so only runs that adapt something do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from train.errors import OmniTuneError
from train.modules.packed import PackedModel
from train.modules.trainable import Rules, canonical_name, is_adapter, module_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


@dataclass(frozen=True)
class LoraSettings:
    """How adapters are built: `targets` are linear layers by module, as the ends of their names; the rest is peft's."""

    targets: Mapping[str, Sequence[str]]
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True


def add_adapters(
    model: nn.Module,
    rules: Rules,
    settings: LoraSettings,
    *,
    fully_tuned: Iterable[str] = (),
    in_float32: bool = False,
) -> PeftModel:
    """The model with adapters on the linear layers that `settings.targets` names.

    fully_tuned: modules that peft shall copy and carry with the adapter (`modules_to_save`): what an
    adapter folder needs to be complete. Training leaves it empty and tunes those modules in place.
    in_float32: adapters in float32 beside half-precision weights: where they are their own master weights, and in an
    exported adapter. Under ZeRO they have the weights' dtype, since it wants one for all that learns, and keeps fp32
    master weights apart.
    """
    from peft import get_peft_model

    names = list(_targets(model, rules, settings.targets))
    if not names:
        wanted = "; ".join(f"{module}: {', '.join(ends)}" for module, ends in settings.targets.items())
        raise OmniTuneError(f"LoRA has nothing to adapt: no linear layer of the model ends like {wanted}")
    saved = [root for module in fully_tuned for root in _roots(model, rules, module)]
    return get_peft_model(model, _config(settings, names, saved), autocast_adapter_dtype=in_float32)


def _config(settings: LoraSettings, names: list[str], saved: Sequence[str] = ()) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        target_modules=names,
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a number; peft divides it by the rank
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights,  # type: ignore[arg-type]  # checks/ admits what peft knows
        modules_to_save=list(saved) or None,
    )


def quantize_linear_layers(
    model: PackedModel, rules: Rules, module: str, *, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """Keep the linear layers of `module` in 4 bits: NF4, blocks of 64 weights, scales quantised again (QLoRA).

    The head stays as it is, since the loss takes its weight, and so does all that is no linear layer.

    Args:
        compute_dtype: what the products run in; weights are expanded to it, layer by layer.
        device: where the weights are quantised, and stay.
    """
    from peft.utils.integrations import gather_params_ctx

    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not head and module_of(f"{name}.weight", rules) == module:
            with gather_params_ctx(layer.weight):  # whole under ZeRO-3 too, which shards the packed ones again
                model.set_submodule(name, _quantized(layer, compute_dtype, device))
    setattr(model, "is_loaded_in_4bit", True)  # noqa: B010  peft goes by it


def _quantized(layer: nn.Linear, compute_dtype: torch.dtype, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantized = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype, quant_type="nf4", device="meta"
    )
    packed = Params4bit(layer.weight.data, quant_type="nf4", module=quantized)
    quantized.weight = packed.to(device)  # type: ignore[misc]  # its declaration of `to` fits no parameter
    quantized.bias = layer.bias
    # On a CPU with AVX512-BF16, bitsandbytes would repack the weights in the first forward in eval mode: their scales
    # rounded to bfloat16, products in bfloat16, and no gradient through the layer any more.
    quantized.support_avx512bf16_for_cpu = False
    return quantized


def load_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put trained values (by canonical parameter name) into a model, with or without adapters."""
    left = set(state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".original_module." not in name and (plain := canonical_name(name)) in left:
                parameter.copy_(state[plain])
                left.remove(plain)
    if left:
        raise OmniTuneError(f"the model has no parameter '{min(left)}' ({len(left)} trained ones left over)")


def merge(model: PeftModel) -> nn.Module:
    """The plain model with the adapters' products added to its weights."""
    return model.merge_and_unload(safe_merge=True)


def merged_weight(weight: Tensor, adapter: Mapping[str, Tensor], settings: LoraSettings) -> Tensor:
    """A linear layer's weight (out, in) with its adapter's product added as `merge` adds it, float32.

    adapter: its trained values, by what follows the layer in their names ("lora_A.default.weight", ...).
    """
    from peft import get_peft_model

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(torch.float32))
    model = get_peft_model(nn.ModuleDict({"layer": layer}), _config(settings, ["layer"]))
    load_trained(model, {f"layer.{name}": value for name, value in adapter.items()})
    return merge(model).get_parameter("layer.weight").detach()


def adapter_parts(trained: Iterable[str]) -> dict[str, dict[str, str]]:
    """Names of trained adapters by the linear layer they belong to: {layer: {rest of the name: name}}."""
    parts: dict[str, dict[str, str]] = {}
    for name in trained:
        if is_adapter(name):
            layer, part = name.split(".lora_")
            parts.setdefault(layer, {})[f"lora_{part}"] = name
    return parts


def save_adapter(
    skeleton: nn.Module,
    rules: Rules,
    settings: LoraSettings,
    trained: Mapping[str, Tensor],
    folder: Path,
    *,
    base: Path | str,
    fully_tuned: Iterable[str],
) -> None:
    """Write the adapter, float32, as peft itself loads it onto the model of folder `base`.

    skeleton: that model on the meta device; trained and fully_tuned: as in `add_adapters` and `load_trained`.
    """
    model = add_adapters(skeleton, rules, settings, fully_tuned=fully_tuned, in_float32=True)
    learned = {
        name: trained[canonical_name(name)]
        for name, _ in model.named_parameters()
        if is_adapter(name) or ".modules_to_save." in name
    }
    model.load_state_dict(learned, strict=False, assign=True)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder))


def _targets(model: nn.Module, rules: Rules, targets: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        ends = targets.get(module_of(f"{name}.weight", rules), ())
        if any(name == end or name.endswith(f".{end}") for end in ends):
            yield name


def _roots(model: nn.Module, rules: Rules, module: str, prefix: str = "") -> Iterator[str]:
    """The topmost submodules all of whose parameters belong to `module`."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        owners = {module_of(f"{path}.{parameter}", rules) for parameter, _ in child.named_parameters()}
        if owners == {module} and not isinstance(child, nn.ModuleList):
            yield path
        elif module in owners:
            yield from _roots(child, rules, module, f"{path}.")
