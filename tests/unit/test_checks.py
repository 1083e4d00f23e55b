"""Rules between options: each fault is named with its fix, all of them at once."""

from pathlib import Path

import pytest

from train.checks import check
from train.config import MODULES, Engine, ModelOptions, Options, SourceOptions
from train.errors import ConfigError


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "records.jsonl").write_text("{}\n")
    options = Options(model=ModelOptions(random_from=str(tmp_path)))
    options.data.train = [SourceOptions(path=str(tmp_path / "records.jsonl"))]
    return options


def faults(options: Options, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(options, world_size)
    return caught.value.problems


def test_good_options_pass(options: Options) -> None:
    check(options)


def test_all_faults_are_reported_together(options: Options) -> None:
    options.data.train[0].path = "missing.jsonl"
    options.run.packs_per_step = 0
    options.optim.warmup_ratio = 2
    assert faults(options) == [
        "data.train[0].path: there is no file 'missing.jsonl'",
        "run.packs_per_step is 0; the least is 1",
        "optim.warmup_ratio is 2; it must lie between 0 and 1",
    ]


def test_nothing_tuned(options: Options) -> None:
    for name in MODULES:
        setattr(options.modules, f"tune_{name}", False)
    assert faults(options)[0].startswith("nothing is tuned: set at least one of modules.tune_vision_encoder")


def test_lora_with_nothing_to_adapt(options: Options) -> None:
    options.lora.modules = ["llm"]
    options.modules.tune_llm = False
    assert "LoRA has nothing to adapt" in faults(options)[0]


def test_lora_of_an_unknown_module(options: Options) -> None:
    options.lora.modules = ["video"]
    assert faults(options)[0].startswith("lora.modules: there is no module 'video'; choose from vision_encoder")


def test_a_folder_without_weights(options: Options) -> None:
    options.model.path = options.model.random_from
    assert "has no weights (*.safetensors)" in faults(options)[0]


@pytest.mark.parametrize(("path", "said"), [(None, "is not set"), ("nowhere", "there is no folder")])
def test_a_missing_model(options: Options, path: str | None, said: str) -> None:
    options.model = ModelOptions(path=path)
    assert said in faults(options)[0]


def test_engine_none_is_for_one_process(options: Options) -> None:
    options.engine.name = Engine.none
    check(options, 1)
    assert "use engine=ddp or engine=zero2" in faults(options, 2)[0]


def test_deepspeed_entries_need_deepspeed(options: Options) -> None:
    options.engine.deepspeed = {"zero_optimization": {"overlap_comm": True}}
    assert "does not use DeepSpeed" in faults(options)[0]
    options.engine.name = Engine.zero2
    check(options)


def test_ligers_kernel_needs_cuda(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    options.run.liger_loss = True
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert faults(options) == [
        "run.liger_loss: Liger's kernel needs CUDA, which torch does not see here; leave the option out"
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("train.checks.find_spec", lambda name: None)
    assert "pip install liger-kernel" in faults(options)[0]
