"""The export of a run: from its checkpoint and its options."""

import json
from pathlib import Path

from train.checks.chosen import tuned_modules
from train.config import Options
from train.data.record_set import BadNote, RecordSet
from train.export.base_folder import REPORT
from train.export.checkpoint_reader import MANIFEST, read_state, trained_weights
from train.export.model_folder import export
from train.families.family import Family
from train.families.registry import find
from train.modules.adapters import LoraSettings


def export_checkpoint(options: Options, base: Path, checkpoint: Path, folder: Path, records: RecordSet) -> None:
    """Write a model folder from a checkpoint of a run with these options, and check it on a few of the records."""
    trained = trained_weights(checkpoint)
    state = read_state(checkpoint)
    records.leave_out(BadNote(**note) for note in state["quarantine"])
    adapted = options.lora.modules
    export(
        base,
        trained,
        folder,
        step=state["step"],
        batch=records.few(),
        lora=lora_settings(options, find(base)) if adapted else None,
        fully_tuned=tuple(name for name in tuned_modules(options) if name not in adapted),
        with_code=options.export.with_code,
    )


def is_export_of(checkpoint: Path, folder: Path, options: Options) -> bool:
    """Whether a model folder is the whole export of this checkpoint, with what the options ask for."""
    report, manifest = folder / REPORT, checkpoint / MANIFEST
    try:
        said = json.loads(report.read_text(encoding="utf-8"))
        is_newer = report.stat().st_mtime >= manifest.stat().st_mtime
        made_of = said["step"], said["with_code"]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or none of ours
        return False
    return is_newer and made_of == (read_state(checkpoint)["step"], options.export.with_code)


def lora_settings(options: Options, family: Family) -> LoraSettings:
    """The adapters that the options ask for, with the family's usual targets where they name none."""
    wanted = [name for name in tuned_modules(options) if name in options.lora.modules]
    return LoraSettings(
        targets={name: tuple(options.lora.targets.get(name) or family.lora_targets[name]) for name in wanted},
        rank=options.lora.rank,
        alpha=options.lora.alpha,
        dropout=options.lora.dropout,
        use_rslora=options.lora.use_rslora,
        use_dora=options.lora.use_dora,
        init_lora_weights=options.lora.init_lora_weights,
    )
