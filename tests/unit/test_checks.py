"""Rules between options: each fault is named with its fix, all of them at once."""

import dataclasses
import math
from importlib.metadata import PackageNotFoundError
from operator import attrgetter
from pathlib import Path
from unittest.mock import Mock

import pytest

from train.checks.check import check
from train.config import MODULES, Engine, LoraOptions, ModelOptions, Options, Precision, SourceOptions
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
        "optim.warmup_ratio is 2; it must lie between 0 and 1",
        "run.packs_per_step is 0; it must lie between 1 and 100000",
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules": [], "use_dora": True}, "lora.use_dora is set, but lora.modules is empty"),
        (
            {"modules": [], "rank": 8},
            "lora.rank is set, but lora.modules is empty, so all would learn in full; add lora=",
        ),
        ({"modules": [], "targets": {"llm": ["q_proj"]}}, "lora.targets is set, but lora.modules is empty"),
        ({"init_lora_weights": "pissa_niter_4"}, "moves part of the base into the adapter"),
        ({"init_lora_weights": False}, "use true, gaussian or orthogonal"),
        ({"init_lora_weights": "orthogonal", "rank": 5}, "needs an even lora.rank, and it is 5"),
        ({"init_lora_weights": "orthogonal", "load_in_4bit": True}, "use true or gaussian"),
        ({"modules": ["vision_proj"], "load_in_4bit": True}, "put llm among lora.modules"),
    ],
)
def test_lora_options_that_do_not_fit(options: Options, changes: dict, said: str) -> None:
    options.lora = LoraOptions(**{"modules": ["llm"], **changes})
    [fault] = faults(options)
    assert said in fault


def numbers(kind: type, prefix: str = "") -> list[str]:
    """Names of all options that hold a number."""
    found = []
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.type):
            found += numbers(item.type, f"{prefix}{item.name}.")
        elif item.type in (int, float, int | None):
            found.append(prefix + item.name)
    return found


def put(options: Options, name: str, value: object) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(attrgetter(owner)(options), leaf, value)


def test_these_are_numbers() -> None:
    assert len(numbers(Options)) == 42
    assert {"lora.alpha", "run.max_steps", "modules.lr.llm", "data.decode_limit_s"} < set(numbers(Options))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e12, -1e-3])
@pytest.mark.parametrize("name", numbers(Options))
def test_every_number_is_bounded(name: str, value: float, options: Options) -> None:
    options.lora.modules = ["llm"]
    put(options, name, value)
    [fault] = faults(options)
    assert fault.startswith(f"{name} is {value}; it must lie between ")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e9, -1.0, 0.0])
def test_a_sources_weight_is_bounded(value: float, options: Options) -> None:
    options.data.train[0].weight = value
    [fault] = faults(options)
    assert fault.startswith(f"data.train[0].weight is {value}; it must lie between ")


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), (0.9, 1.0), (math.nan, 0.9), (-0.1, 0.9)])
def test_two_betas_below_one(betas: tuple[float, ...], options: Options) -> None:
    options.optim.betas = betas  # type: ignore[assignment]  # what Hydra lets pass
    [fault] = faults(options)
    assert fault == f"optim.betas is {list(betas)}; it takes two numbers from 0 to below 1"


@pytest.mark.parametrize(("name", "value"), [("run.seed", 2**32), ("run.threads", 100_000), ("lora.rank", 100_000)])
def test_what_crashed_or_ate_all_memory(name: str, value: int, options: Options) -> None:
    options.lora.modules = ["llm"]
    put(options, name, value)
    assert len(faults(options)) == 1


def test_what_learns_needs_a_rate(options: Options) -> None:
    options.modules.lr.llm = 0
    assert faults(options) == ["modules.lr.llm is 0; a module that is tuned needs a rate above 0"]
    options.modules.tune_llm = False
    check(options)
    options.modules.tune_llm, options.modules.lr.llm = True, 1e-6
    options.lora = LoraOptions(modules=["llm"], lr=0)
    assert faults(options) == ["lora.lr is 0; adapters need a rate above 0"]


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


@pytest.mark.parametrize("engine", [Engine.zero3, Engine.zero3_offload])
def test_dora_is_not_for_zero3(options: Options, engine: Engine) -> None:
    options.lora = LoraOptions(modules=["llm"], use_dora=True)
    options.engine.name = engine
    assert "use engine=zero2, or lora=lora" in faults(options)[0]


def test_deepspeed_entries_need_deepspeed(options: Options) -> None:
    options.engine.deepspeed = {"zero_optimization": {"overlap_comm": True}}
    assert "does not use DeepSpeed" in faults(options)[0]
    options.engine.name = Engine.zero2
    check(options)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: run.packs_per_step decides it"),
        ({"bf16": {"enabled": True}}, "bf16: run.precision decides it"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: engine=zero1, zero2 or zero3 decides it"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: the loss is normalised for the mean"),
    ],
)
def test_deepspeed_entries_that_our_options_decide(options: Options, entry: dict, said: str) -> None:
    options.engine.name = Engine.zero2
    options.engine.deepspeed = entry
    [fault] = faults(options)
    assert fault.startswith(f"engine.deepspeed.{said}")


def test_gradients_in_fp32_are_not_for_zero1(options: Options) -> None:
    """DeepSpeed 0.19 then takes its BF16_Optimizer, which has none of the state that ZeRO's have."""
    options.engine.name = Engine.zero1
    options.engine.deepspeed = {"data_types": {"grad_accum_dtype": "fp32"}}
    assert "cannot be resumed; use engine=zero2" in faults(options)[0]
    options.engine.name = Engine.zero2
    check(options)


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
"""What `accelerate launch` says when it was told nothing."""


@pytest.mark.parametrize(
    ("engine", "told", "said"),
    [
        ("ddp", {"ACCELERATE_USE_DEEPSPEED": "true"}, "--use_deepspeed: engine=ddp does not use DeepSpeed"),
        ("zero2", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "--zero_stage 3: engine=zero2 is stage 2"),
        ("zero3", {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload to cpu: engine=zero3 does not"),
        ("zero2", {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "--deepspeed_config_file: it is not read"),
        ("ddp", {"ACCELERATE_USE_FSDP": "true"}, "--use_fsdp: there is no FSDP engine; use engine=zero3"),
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "fp16"}, "--mixed_precision fp16: run.precision is bf16"),
        ("zero2", {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--gradient_accumulation_steps 4: run.packs_per"),
        ("zero2", {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "--gradient_clipping 0.5: optim.max_grad_norm is 1.0"),
        ("ddp", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend inductor: it is not read"),
        ("ddp", {"MASTER_PORT": "29500"}, "several processes were asked for, and one was started; add --multi_gpu"),
    ],
)
def test_what_accelerate_was_told_and_the_options_do_not_say(
    options: Options, engine: str, told: dict[str, str], said: str
) -> None:
    options.engine.name = Engine(engine)
    check(options, 1, ACCELERATE)
    with pytest.raises(ConfigError) as caught:
        check(options, 1, ACCELERATE | told)
    [fault] = caught.value.problems
    assert fault.startswith(f"accelerate launch: {said}")


def test_what_accelerate_was_told_alike(options: Options) -> None:
    options.engine.name = Engine.zero3_offload
    told = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
        "MASTER_PORT": "29500",
        "WORLD_SIZE": "2",
    }
    check(options, 2, ACCELERATE | told)


def test_ligers_kernel_needs_cuda(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    options.run.liger_loss = True
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert faults(options) == [
        "run.liger_loss: Liger's kernel needs CUDA, which torch does not see here; leave the option out"
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("train.checks.launch.version", Mock(side_effect=PackageNotFoundError))
    assert faults(options) == ["run.liger_loss: liger-kernel is not installed; pip install 'liger-kernel>=0.8.2'"]


@pytest.mark.parametrize(
    ("version", "is_old"), [("0.8.1", True), ("0.5.10", True), ("0.8.2", False), ("0.10.0", False)]
)
def test_an_old_liger_gives_wrong_gradients(
    version: str, is_old: bool, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / f"liger_kernel-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: liger_kernel\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    options.run.liger_loss = True
    if is_old:
        [fault] = faults(options)
        assert fault.startswith(f"run.liger_loss: liger-kernel {version} gives wrong gradients")
    else:
        check(options)


@pytest.mark.parametrize("value", ["0", "true", "half", "-1", "1.5", ""])
def test_activation_checkpointing_is_none_full_or_a_number(options: Options, value: str) -> None:
    options.run.activation_checkpointing.towers = value
    assert faults(options) == [
        f"run.activation_checkpointing.towers is '{value}'; use none, full, or n for every n-th layer (2, 3, ...)"
    ]


def test_compiling_is_refused_where_it_does_not_work(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    options.run.compile = True
    check(options)
    options.engine.name = Engine.zero3_offload
    [fault] = faults(options)
    assert fault.startswith("run.compile: engine=zero3_offload gathers weights inside of layers")
    options.engine.name = Engine.none
    options.lora = LoraOptions(modules=["llm"], use_dora=True)
    assert faults(options) == [
        "run.compile: peft's DoRA cannot be compiled; use lora=lora, or leave the option out",
    ]
    options.lora = LoraOptions()
    options.run.precision = Precision.fp32
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert faults(options) == [
        "run.compile: on CUDA it needs run.precision=bf16, since attention in fp32 waits for the host",
    ]
