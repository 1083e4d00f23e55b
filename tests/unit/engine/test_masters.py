import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runs import build_here, write_records
from train.config import OptimizerName, OptimOptions
from train.engine.engines import OwnEngine
from train.engine.masters import MasterWeights
from train.engine.optimizer import make_optimizers, matrices
from train.modules.trainable import Group


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20))


def inputs(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(7, 40, generator=generator) for _ in range(number)]


def test_bf16_gradients_of_micro_batches_are_summed_in_float32() -> None:
    model = layers()
    masters = MasterWeights(model.parameters(), torch.bfloat16)
    reference = copy.deepcopy(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in model.parameters()]
    for x in inputs(8):
        model(x.bfloat16()).square().sum().backward()
        each = torch.autograd.grad(reference(x.bfloat16()).square().sum(), list(reference.parameters()))
        expected = [total + gradient.double() for total, gradient in zip(expected, each, strict=True)]
    for parameter, total in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is None  # freed as soon as it was added
        assert torch.allclose(masters[parameter].grad.double(), total, rtol=1e-6, atol=1e-6 * float(total.abs().max()))


def test_masters_keep_what_bf16_rounds_away() -> None:
    model = layers()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    masters = MasterWeights(model.parameters(), torch.bfloat16)
    for parameter, values in zip(model.parameters(), before, strict=True):
        assert masters[parameter].equal(values)
        assert parameter.equal(values.bfloat16())
        with torch.no_grad():
            masters[parameter].add_(1e-5)
    masters.write_back()
    for parameter, values in zip(model.parameters(), before, strict=True):
        assert parameter.equal((values + 1e-5).bfloat16())


def test_a_float32_parameter_is_its_own_master() -> None:
    model = layers()
    masters = MasterWeights(model.parameters(), torch.float32)
    reference = layers()
    for x in inputs(3):
        model(x).sum().backward()
        reference(x).sum().backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    assert masters.clip(0.5).equal(norm)
    for parameter, same in zip(model.parameters(), reference.parameters(), strict=True):
        assert masters[parameter] is parameter
        assert parameter.grad.equal(same.grad)
    masters.zero_gradients()
    assert not any(parameter.grad.any() for parameter in model.parameters())


class Casts(TorchDispatchMode):
    """Counts the operations that change the dtype of one of some tensors, by its place in memory."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.places = {tensor.data_ptr() for tensor in tensors}
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = {"aten::_to_copy": 0, "aten::copy_": 1}.get(func.name().partition(".")[0])
        if source is not None and args[source].data_ptr() in self.places and out.dtype != args[source].dtype:
            self.seen.append(f"{func} {tuple(out.shape)}")
        return out


@pytest.mark.parametrize("packs", [1, 3])
def test_weights_are_cast_once_a_step_and_in_no_micro_batch(packs: int, tmp_path: Path) -> None:
    words = [*write_records(tmp_path, train=24), "run.precision=bf16", "data.eval=[]", f"run.packs_per_step={packs}"]
    run = build_here(["+recipe=full", *words, f"run.dir={tmp_path / 'run'}", "data.max_tokens=128", "run.max_steps=1"])
    step = run.trainer.train_step
    engine = cast(OwnEngine, step.engine)
    fetched = next(iter(run.trainer.steps_from(0, 0)))
    parameters, masters = engine.masters.parameters, engine.masters.masters
    with Casts([*parameters, *masters]) as casts:
        step(0, fetched.batches)
    assert len(casts.seen) == len(parameters) > 100
    with Casts([*parameters, *masters]) as casts:  # the check can fail
        parameters[0].float()
    assert len(casts.seen) == 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


def by(name: OptimizerName) -> tuple[Model, MasterWeights, Callable[[], None]]:
    """A model in bf16, and one step of an optimizer over its masters."""
    model = Model()
    masters = MasterWeights(model.parameters(), torch.bfloat16)
    taken = matrices(model) if name is OptimizerName.muon else set()
    groups = [
        Group("llm", "llm", 1e-2, 0.1, wanted, [p for p in model.parameters() if (p in taken) is wanted])
        for wanted in (False, True)
    ]
    optimizers = make_optimizers(
        [group for group in groups if group.parameters], masters.__getitem__, OptimOptions(name)
    )
    assert [group["lr"] for group in optimizers.param_groups] == [1e-2] * len(optimizers.param_groups)

    def step() -> None:
        model(torch.arange(9)).float().logsumexp(-1).sum().backward()
        optimizers.step()
        masters.write_back()

    return model, masters, step


def test_muon_updates_matrices_and_adamw_the_rest() -> None:
    """As torch's own two optimizers on the same float32 weights and gradients."""
    model, masters, step = by(OptimizerName.muon)
    assert matrices(model) == {model.body.weight}
    named = {name: masters[parameter] for name, parameter in model.named_parameters()}
    twin = {name: nn.Parameter(value.detach().clone()) for name, value in named.items()}
    step()
    for name, value in twin.items():
        value.grad = named[name].grad
    body = twin.pop("body.weight")
    optim = OptimOptions()
    for optimizer in (
        torch.optim.Muon([body], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(twin.values(), lr=1e-2, weight_decay=0.1, betas=optim.betas, eps=optim.eps, fused=True),
    ):
        optimizer.step()
    assert all(named[name].equal(value) for name, value in (twin | {"body.weight": body}).items())


def test_8_bit_adamw_is_bitsandbytes() -> None:
    from bitsandbytes.optim import AdamW8bit

    model, masters, step = by(OptimizerName.adamw_8bit)
    twin = [nn.Parameter(masters[parameter].detach().clone()) for parameter in model.parameters()]
    step()
    for value, parameter in zip(twin, model.parameters(), strict=True):
        value.grad = masters[parameter].grad.clone()
    AdamW8bit(twin, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-8).step()
    assert all(masters[parameter].equal(value) for value, parameter in zip(twin, model.parameters(), strict=True))
