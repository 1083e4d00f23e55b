"""Learning rates are a pure function of the step."""

import pytest

from train.config import OptimOptions, Schedule
from train.engine.optimizer import LearningRates
from train.modules.trainable import Group


def factors(schedule: Schedule, **options: float) -> list[float]:
    optim = OptimOptions(schedule=schedule, **options)  # type: ignore[arg-type]
    rates = LearningRates([], optim, total_steps=8)
    return [round(rates.factor(step), 4) for step in range(8)]


def test_linear_with_warmup() -> None:
    assert factors(Schedule.linear, warmup_ratio=0.5) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_reaches_half_in_the_middle_and_keeps_its_floor() -> None:
    assert factors(Schedule.cosine, warmup_ratio=0.0)[4] == 0.5
    assert factors(Schedule.cosine, warmup_ratio=0.0, min_lr_ratio=0.2)[4] == 0.6


def test_constant() -> None:
    assert factors(Schedule.constant, warmup_ratio=0.25) == [0.5, 1, 1, 1, 1, 1, 1, 1]


def test_rates_go_to_the_groups() -> None:
    class Optimizer:
        def __init__(self) -> None:
            self.param_groups = [{"lr": 0.0}, {"lr": 0.0}]

    optimizer = Optimizer()
    groups = [Group("llm", "llm", 1e-3, 0.1, False, []), Group("vision_proj.lora", "vision_proj", 1e-2, 0.0, False, [])]
    rates = LearningRates(groups, OptimOptions(warmup_ratio=0.5), total_steps=4)
    assert rates.set(optimizer.param_groups, 0) == pytest.approx({"llm": 5e-4, "vision_proj.lora": 5e-3})
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-3])
    assert rates.set(optimizer.param_groups, 1, idle={"vision_proj"}) == pytest.approx(
        {"llm": 1e-3, "vision_proj.lora": 0}
    )
