"""One loss: the same samples give the same gradient, in however many packs, on however many ranks."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.runs import succeed, write_records
from train.config import MODULES
from train.families.megrezo import MEGREZO
from train.modules.trainable import module_of

pytestmark = pytest.mark.end_to_end

RECORDS = list(range(12))
ONE_PACK = [[RECORDS]]
FOUR_PACKS = [[RECORDS[0:2], RECORDS[2:5], RECORDS[5:9], RECORDS[9:12]]]
TWO_RANKS = [[RECORDS[0:2], RECORDS[2:5]], [RECORDS[5:9], RECORDS[9:12]]]
UNEVEN = [[RECORDS[0:6], RECORDS[6:8]], [RECORDS[8:12], []]]


def gradients(folder: Path, packs: list[list[list[int]]], engine: str) -> tuple[float, dict[str, Tensor]]:
    """The loss, and each module's gradient as one vector."""
    words = [*write_records(folder, train=len(RECORDS)), f"run.dir={folder / 'run'}", "tracker=none"]
    words += ["modules.lr.llm=1e-3", f"engine={engine}", "optim.max_grad_norm=0", "data.eval=[]"]
    out = folder / "gradients.safetensors"
    succeed([str(out), json.dumps(packs), *words], processes=len(packs), script="tests/end_to_end/gradients_of.py")
    by_module = defaultdict(list)
    with safe_open(out, "pt") as file:
        for name in sorted(file.keys()):
            by_module[module_of(name, MEGREZO.rules)].append(file.get_tensor(name).flatten().double())
        loss = float(file.metadata()["loss"])
    return loss, {module: torch.cat(parts) for module, parts in by_module.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, Tensor]]:
    return gradients(tmp_path_factory.mktemp("one_pack"), ONE_PACK, "none")


@pytest.mark.parametrize(
    ("packs", "engine"),
    [
        pytest.param(FOUR_PACKS, "none", id="4-packs"),
        *(pytest.param(TWO_RANKS, engine, id=f"2-ranks-{engine}") for engine in ("ddp", "zero2", "zero3")),
        *(pytest.param(UNEVEN, engine, id=f"uneven-{engine}") for engine in ("ddp", "zero3")),
    ],
)
def test_the_gradient_is_that_of_one_pack(
    packs: list[list[list[int]]], engine: str, reference: tuple[float, dict[str, Tensor]], tmp_path: Path
) -> None:
    loss, by_module = gradients(tmp_path, packs, engine)
    assert loss == pytest.approx(reference[0], rel=1e-6)
    assert set(by_module) == set(MODULES)
    for module, mine in by_module.items():
        other = reference[1][module]
        assert torch.cosine_similarity(mine, other, dim=0) >= 0.999999, module
        assert abs(mine.norm() - other.norm()) / other.norm() <= 1e-5, module
