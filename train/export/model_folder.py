"""A model folder made of the folder that training started from, and what was trained."""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from train.errors import CheckpointError
from train.export.adapter_card import write_card
from train.export.base_folder import ADAPTER, REPORT, check_files, check_room, side_files
from train.export.check import verify
from train.export.remote_code import add_remote_code
from train.export.shards import rewrite_shard, shards_of, stored_dtypes
from train.families.registry import find
from train.modules.adapters import LoraSettings, adapter_parts, merged_weight, save_adapter
from train.modules.trainable import is_adapter, names_of_parameters
from train.schema import Batch

log = logging.getLogger(__name__)


def export(
    base: Path,
    trained: Mapping[str, Tensor],
    folder: Path,
    *,
    step: int,
    batch: Batch,
    lora: LoraSettings | None = None,
    fully_tuned: tuple[str, ...] = (),
    with_code: bool = False,
) -> Path:
    """Write `base` with the trained values in place to `folder`; with LoRA merged, and apart in adapter/.

    base: folder of the model that training started from, with weights in safetensors.
    trained: float32 values by parameter name, adapters among them; each is asked for when its tensor is written.
    folder: replaced as a whole once the new one is complete and checked.
    step: optimizer step of the trained values.
    batch: a few samples, by which the written folder is compared with the trained model.
    fully_tuned: modules that were tuned in full beside the adapters; they go with the adapter.
    with_code: add our classes, so that the folder loads where this project is not installed; the base's own Python
        stays behind, so that no other code runs there.

    Shards, keys and dtypes are those of `base`; what was not trained is copied bit for bit, side files included. A
    QLoRA adapter is merged onto these weights too, as other tools merge and load it, and not onto the 4-bit ones it
    learned beside: the export has the adapter's work and none of the rounding.

    Raises CheckpointError if `base` cannot be exported, or if the check fails; the folder is then kept beside `folder`
    with ".failed" after its name.
    """
    family = find(base)
    check_files(base)
    skeleton = family.skeleton(base)
    check_room(base, skeleton, trained, folder, with_adapter=lora is not None)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        copy_side_files(base, aside, with_python=not with_code)
        write_weights(base, skeleton, trained, aside, lora)
        if lora:
            save_adapter(skeleton, family.rules, lora, trained, aside / ADAPTER, base=base, fully_tuned=fully_tuned)
            write_card(aside / ADAPTER, family, base, lora, fully_tuned)
        if with_code:
            add_remote_code(aside, family)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"the export to '{folder}' cannot be written: {error}; nothing is lost: make room, and `omnitune export` "
            "goes on from the run's checkpoint"
        ) from error
    report: dict[str, Any] = {"base": str(base), "step": step, "with_code": with_code}
    report |= verify(family, base, trained, aside, batch, lora)
    (aside / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not report["ok"]:
        failed = folder.with_name(f"{folder.name}.failed")
        _replace(failed, aside)
        raise CheckpointError(
            f"the export is not what was trained: {faults_of(report)}. It lies in '{failed}' with its {REPORT}; "
            "do not use it, and report this with that file"
        )
    _replace(folder, aside)
    log.info(
        "every tensor of the export is what was trained; stored as %s, its logits differ by %.2g at "
        "most from those of the base with the trained values",
        report["dtype"],
        report["difference"]["logits"],
    )
    return folder


def write_weights(
    base: Path, skeleton: nn.Module, trained: Mapping[str, Tensor], folder: Path, lora: LoraSettings | None
) -> None:
    """Write the base's shards to `folder`, with what was trained in its place; holds one tensor at a time.

    skeleton: the base's model on the meta device, for the names of its parameters.
    """
    adapters = adapter_parts(trained)

    def changed(name: str, weight: Tensor) -> Tensor:
        if name in trained:
            return trained[name]
        assert lora
        parts = adapters[name.removesuffix(".weight")]
        return merged_weight(weight, {part: trained[whole] for part, whole in parts.items()}, lora)

    changes = {key: partial(changed, name) for key, name in _changed_keys(base, skeleton, trained).items()}
    for shard in shards_of(base):
        rewrite_shard(shard, folder / shard.name, changes)


def check_base(base: Path, model: nn.Module, trained: Iterable[str]) -> None:
    """Raise CheckpointError where an export would find no place for what is going to be trained.

    model: as loaded from `base`; trained: canonical names of parameters, adapters among them.
    """
    _changed_keys(base, model, trained)


def copy_side_files(base: Path, folder: Path, *, with_python: bool = True) -> None:
    """Copy what is not weights (tokenizer, settings, foreign files and folders) and not there yet.

    with_python: the base's own code too, which `trust_remote_code=True` may run.
    """
    for path in side_files(base):
        target = folder / path.name
        if target.exists() or (path.suffix == ".py" and not with_python):
            continue
        if path.is_dir():
            shutil.copytree(path, target, ignore=None if with_python else shutil.ignore_patterns("*.py"))
        else:
            shutil.copyfile(path, target)


def write_random_model(settings: Path, folder: Path, seed: int) -> None:
    """Write a model of the configuration in `settings` with weights drawn from `seed`, side files included."""
    check_files(settings)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    find(settings).random_model(settings, seed).float().save_pretrained(aside)
    # What transformers has guessed from config.json gives way to the folder's own, where there is one.
    (aside / "generation_config.json").unlink(missing_ok=True)
    copy_side_files(settings, aside)
    _replace(folder, aside)


def _changed_keys(base: Path, model: nn.Module, trained: Iterable[str]) -> dict[str, str]:
    """The keys in the base's shards whose tensors training changes, and the names of these parameters.

    They differ where parameters are tied: any of their names may be the stored one, or several.
    """
    names = set(trained)
    changed = {name for name in names if not is_adapter(name)} | {f"{layer}.weight" for layer in adapter_parts(names)}
    owners = names_of_parameters(model)
    stored = {key: owners[key] for key in stored_dtypes(base) if key in owners}
    wanted = changed | {name for name in owners.values() if not is_adapter(name)}
    if lost := sorted(wanted - set(stored.values())):
        raise CheckpointError(
            f"'{base}' stores {len(lost)} of the weights under other keys than the model's own, or not as "
            f"floating-point numbers, '{lost[0]}' among them; load it with transformers, save_pretrained it, and start "
            "from that folder"
        )
    return {key: name for key, name in stored.items() if name in changed}


def faults_of(report: dict[str, Any]) -> str:
    """What a check of the export found wrong."""
    difference, tolerance = report["difference"], report["tolerance"]
    if wrong := report["wrong"]:
        return f"{len(wrong)} tensors hold other values, '{wrong[0]}' among them"
    if not report["merging"] <= tolerance["merging"]:
        return f"a layer computes other values with its adapter merged, by {report['merging']:.2g} of the largest"
    return f"logits differ by {difference['logits']:.2g}, and {tolerance['logits']:.2g} can be explained"


def _replace(folder: Path, new: Path) -> None:
    """Give `new` the name of `folder`, which is never there in part."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
