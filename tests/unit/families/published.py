"""The published folders of tests/published, with a value changed, or with a tokenizer of the published ids."""

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.runs import ROOT

PUBLISHED = ROOT / "tests" / "published"
NAMES = ("megrez_3b_omni", "megrez_3b_instruct", "minicpm_2b", "minicpm_2b_llama")
ABSENT = object()


def changed(name: str, to: Path, file: str = "config.json", **values: Any) -> Path:
    """A copy of a published folder, keys of one of its files changed: `a__b` is b in a's mapping, ABSENT takes out."""
    folder = to / name
    shutil.copytree(PUBLISHED / name, folder)
    settings = json.loads((folder / file).read_text(encoding="utf-8"))
    for key, value in values.items():
        *outer, last = key.split("__")
        holder = settings[outer[0]] if outer else settings
        if value is ABSENT:
            del holder[last]
        else:
            holder[last] = value
    (folder / file).write_text(json.dumps(settings), encoding="utf-8")
    return folder


def add_tokenizer(folder: Path) -> Path:
    """Put a tokenizer.json into a folder: bytes, and the special tokens of tokenizer_config.json at their ids."""
    if folder.name.startswith("minicpm"):
        shutil.copy(ROOT / "data/tiny_minicpm/tokenizer.json", folder)
        return folder
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {int(index): token["content"] for index, token in config["added_tokens_decoder"].items()}
    (folder / "tokenizer.json").write_text(_tokenizer(tuple(special.items())), encoding="utf-8")
    return folder


@lru_cache
def _tokenizer(special: tuple[tuple[int, str], ...]) -> str:
    """A tokenizer.json with special tokens of these ids, and others between them."""
    names = dict(special)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = letters + [f"word {index}" for index in range(len(letters), min(names))]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(plain)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [names.get(index, f"<|reserved {index}|>") for index in range(min(names), max(names) + 1)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    assert all(tokenizer.token_to_id(token) == index for index, token in special)
    return tokenizer.to_str()
