"""The families there are, and which of them a model folder is of."""

from pathlib import Path

from train.errors import CheckpointError
from train.families.family import Family, read_json
from train.families.gemma4 import GEMMA4
from train.families.megrez_instruct import MEGREZ_INSTRUCT
from train.families.megrezo import MEGREZO
from train.families.minicpm import MINICPM, MINICPM_LLAMA
from train.families.qwen_omni import QWEN_OMNI

FAMILIES: list[Family] = [MEGREZO, MEGREZ_INSTRUCT, MINICPM, MINICPM_LLAMA, QWEN_OMNI, GEMMA4]
"""A family is added here; the first that recognises a folder has it."""


def find(folder: Path | str) -> Family:
    """The family of a model folder, by its config.json and chat template; CheckpointError where it is of none."""
    config = read_json(Path(folder) / "config.json")
    if config is None:
        raise CheckpointError(f"'{folder}' has no config.json, so it is not a model folder")
    model_type, chat_template = str(config.get("model_type")), _chat_template(Path(folder))
    for family in FAMILIES:
        if family.recognises(model_type, chat_template):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(
        f"'{folder}' is of no known family, by model_type '{model_type}' in config.json and "
        f"{'its' if chat_template else 'the lack of a'} chat template (chat_template.jinja, tokenizer_config.json); "
        f"known are {known}"
    )


def _chat_template(folder: Path) -> str:
    """The text of a folder's chat template; "" if it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return str((read_json(folder / "tokenizer_config.json") or {}).get("chat_template") or "")
