"""Where a run happens: DeepSpeed's own eye on its entries, and hints at what was launched."""

import logging

import pytest
import torch

from train.config import Engine, Options, Precision
from train.engine.accelerator import deepspeed_config, make_accelerator, set_convolutions
from train.errors import ConfigError


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    options = Options()
    options.engine.name = Engine.zero2
    return options


def test_deepspeed_entries_are_merged_into_ours(options: Options) -> None:
    options.engine.deepspeed = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    config = deepspeed_config(options)
    assert config["zero_optimization"] == {"stage": 2, "contiguous_gradients": True, "overlap_comm": True}
    assert config["wall_clock_breakdown"] is True
    assert config["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"wall_clock": True}, r"engine\.deepspeed\.wall_clock: DeepSpeed has no such entry; it knows .*wall_clock_br"),
        (
            {"zero_optimization": {"overlap": True}},
            r"(?s)DeepSpeed does not accept it: .*overlap\s+Extra inputs are not",
        ),
        ({"zero_optimization": {"overlap_comm": "maybe"}}, r"(?s)overlap_comm\s+Input should be a valid boolean"),
    ],
)
def test_deepspeed_refuses_what_it_does_not_know(options: Options, entries: dict, said: str) -> None:
    options.engine.deepspeed = entries
    with pytest.raises(ConfigError, match=said):
        deepspeed_config(options)


def test_gpus_that_nobody_uses_are_pointed_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    options = Options()
    options.engine.name = Engine.none
    with caplog.at_level(logging.WARNING):
        make_accelerator(options)
    assert "one process was started, so one of 4 GPUs is used" in caplog.text


@pytest.mark.parametrize(("precision", "allowed"), [(Precision.fp32, False), (Precision.bf16, True)])
def test_float32_means_float32_in_convolutions_too(precision: Precision, allowed: bool) -> None:
    set_convolutions(precision)
    assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.get_float32_matmul_precision() == "highest"  # which raises where torch's two ways of asking are mixed
    set_convolutions(Precision.bf16)  # torch's own default
