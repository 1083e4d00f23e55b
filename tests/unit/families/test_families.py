"""Which folder is of which family, and what a family declares."""

import json
from pathlib import Path

import pytest

from tests.runs import ROOT, write_small_model
from train.errors import CheckpointError
from train.export.model_folder import write_random_model
from train.families.registry import find
from train.modules.trainable import module_of

MEGREZ = "{{ '<|role_start|>' ~ message['role'] ~ '<|role_end|>' }}"
MINICPM = "{{ '<用户>' + message['content'].strip() + '<AI>' }}"


def folder(path: Path, model_type: str, *, template: str = "", in_file: bool = False) -> Path:
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if in_file:
        (path / "chat_template.jinja").write_text(template)
    elif template:
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return path


@pytest.mark.parametrize(
    ("model_type", "template", "name"),
    [
        ("megrezo", MEGREZ, "megrezo"),
        ("llama", MEGREZ, "megrez-instruct"),
        ("minicpm", "", "minicpm"),
        ("llama", MINICPM, "minicpm-llama"),
        ("qwen2_5_omni", "", "qwen-omni"),
        ("gemma4", "", "gemma4"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_family_is_recognised_by_type_and_template(
    model_type: str, template: str, name: str, in_file: bool, tmp_path: Path
) -> None:
    assert find(folder(tmp_path, model_type, template=template, in_file=in_file)).name == name


@pytest.mark.parametrize(
    ("model_type", "template", "said"),
    [
        ("llama", "", "model_type 'llama' in config.json and the lack of a chat template"),
        ("llama", "{{ '[INST]' }}", "model_type 'llama' in config.json and its chat template"),
        ("qwen3", MEGREZ, "known are megrezo, megrez-instruct, minicpm, minicpm-llama, qwen-omni, gemma4"),
    ],
)
def test_a_model_of_no_family_is_refused(model_type: str, template: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="of no known family") as caught:
        find(folder(tmp_path, model_type, template=template))
    assert said in str(caught.value)


@pytest.mark.parametrize("tiny", ["tiny", "tiny_instruct", "tiny_minicpm", "tiny_qwen_omni", "tiny_gemma4"])
def test_the_rules_cover_every_parameter(tiny: str) -> None:
    family = find(ROOT / "data" / tiny)
    model = family.random_model(ROOT / "data" / tiny, seed=0)
    modules = {module_of(name, family.rules) for name, _ in model.named_parameters()}
    assert family.modules <= modules
    assert set(family.lora_targets) == family.modules


@pytest.mark.parametrize("keep", [-100, 1000, 0])
def test_weights_cut_short_are_named(keep: int, tmp_path: Path) -> None:
    model = tmp_path / "random"
    write_random_model(write_small_model(tmp_path), model, seed=0)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"^'{file}' cannot be read .*; copy it again"):
        find(model).load_model(model)
