"""A model folder in another form that computes the same function."""

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.errors import CheckpointError
from train.export.model_folder import copy_side_files
from train.export.shards import INDEX, shards_of
from train.families.registry import find


def convert(folder: Path, form: str, out: Path) -> None:
    """Write a model folder in the form of that name (see `Family.conversions`) to `out`, shard by shard.

    Dtypes stay, side files are copied. Raises CheckpointError where the family has no such form, or a shard is missing.
    """
    family = find(folder)
    if form not in family.conversions:
        known = ", ".join(family.conversions) or "none"
        raise CheckpointError(f"'{folder}' is a {family.name} model, which has no form '{form}'; its forms: {known}")
    conversion = family.conversion(form)
    shards = shards_of(folder)

    def weight(name: str) -> Tensor:
        for shard in shards:
            with safe_open(shard, "pt") as held:
                if name in held.keys():  # noqa: SIM118  (not a mapping)
                    return held.get_tensor(name)
        raise CheckpointError(f"'{folder}' lacks the weight '{name}', so it cannot be converted; copy it again")

    config = conversion.read(json.loads((folder / "config.json").read_text(encoding="utf-8")), weight)
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    places: dict[str, str] = {}
    size = 0
    for shard in shards:
        with safe_open(shard, "pt") as held:
            made: dict[str, Tensor] = {}
            for name in held.keys():  # noqa: SIM118  (not a mapping)
                made |= conversion.weights(name, held.get_tensor(name), config)
            save_file(made, aside / shard.name, metadata=held.metadata())
        places |= dict.fromkeys(made, shard.name)
        size += sum(value.nbytes for value in made.values())
    if (folder / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (aside / "config.json").write_text(json.dumps(conversion.config(config), indent=2) + "\n", encoding="utf-8")
    copy_side_files(folder, aside)
    aside.rename(out)
