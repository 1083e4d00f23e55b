from random import Random

import pytest
import torch
from torch import Tensor
from transformers import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from tests.builders import randomize
from train.families.megrezo.vision import VisionTower, axis_buckets

SIDE, PATCH = 70, 2
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "image_size": SIDE * PATCH,
}


@pytest.fixture
def tower() -> VisionTower:
    torch.manual_seed(0)
    tower = VisionTower(**SIZES)
    randomize(tower)
    return tower.eval()


def cut(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) pixels to flat patches, channel by channel."""
    _, height, width = image.shape
    grid = image.reshape(3, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(1, 3, 0, 2, 4).reshape(-1, 3 * PATCH**2)


def test_buckets_by_hand():
    assert axis_buckets(1, 4).tolist() == [0]
    assert axis_buckets(2, 4).tolist() == [0, 2]
    assert axis_buckets(3, 4).tolist() == [0, 1, 2]
    assert axis_buckets(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert axis_buckets(90, 70).tolist()[-1] == 69


def exact_buckets(patches: int) -> list[int]:
    """Buckets where no rounding decides: the integer part of 70·i/n."""
    return [SIDE * place // patches for place in range(patches)]


@pytest.mark.parametrize("patches", [1, 2, 7, 11, 22, 32, 46, 90])
def test_buckets_are_exact_fractions_where_rounding_does_not_decide(patches):
    assert axis_buckets(patches, SIDE).tolist() == exact_buckets(patches)


def published_buckets(patches: int) -> Tensor:
    """The published formula, word for word: the length of an axis is an integer tensor there."""
    nb_patches = torch.ones(patches, dtype=torch.bool).sum()
    boundaries = torch.arange(1 / SIDE, 1.0, 1 / SIDE)
    fractional_coords = torch.arange(0, 1 - 1e-6, 1 / nb_patches)
    return torch.bucketize(fractional_coords, boundaries, right=True)


def published_positions(height: int, width: int) -> Tensor:
    return (published_buckets(height)[:, None] * SIDE + published_buckets(width)).flatten()


AXES = range(1, 201)


def test_positions_are_the_published_ones_for_every_length_of_either_axis(tower):
    for length in AXES:
        assert tower.embeddings._positions(length, 3).equal(published_positions(length, 3)), length
        assert tower.embeddings._positions(2, length).equal(published_positions(2, length)), length


def test_positions_are_the_published_ones_for_grids_drawn_at_random(tower):
    random = Random(0)
    for _ in range(500):
        height, width = random.choice(AXES), random.choice(AXES)
        assert tower.embeddings._positions(height, width).equal(published_positions(height, width)), (height, width)


def test_positions_are_those_of_idefics2_but_for_eight_lengths():
    """Idefics2 multiplies where the published code counts in steps."""
    boundaries = torch.arange(1 / SIDE, 1.0, 1 / SIDE)

    def idefics2(patches: int) -> Tensor:
        return torch.bucketize(torch.arange(patches) * (1.0 / torch.tensor(patches)), boundaries, right=True)

    apart = [n for n in range(1, 129) if not axis_buckets(n, SIDE).equal(idefics2(n))]
    assert apart == [49, 58, 77, 86, 98, 100, 110, 122]


def test_rounding_of_the_step_decides_at_the_edge_of_a_bucket():
    """By hand: in float32 1/25 is 0.0399999991, so the sixth of 25 patches begins below 14/70 = 0.2, in bucket 13."""
    assert axis_buckets(25, SIDE).tolist()[5] == 13
    doubled = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / 25), torch.arange(1 / SIDE, 1.0, 1 / SIDE), right=True)
    assert doubled.tolist()[5] == 14


def test_equals_idefics2_image_by_image(tower):
    config = Idefics2VisionConfig(**SIZES, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
    reference = Idefics2VisionTransformer(config).eval()
    reference.load_state_dict(tower.state_dict())
    sizes = [(3, 5), (11, 7), (1, 22), (5, 3), (32, 2)]
    images = [torch.randint(0, 256, (3, h * PATCH, w * PATCH), dtype=torch.uint8) for h, w in sizes]
    expected = [reference(((image.float() - 127.5) / 127.5)[None]).last_hidden_state[0] for image in images]
    out = tower(torch.cat([cut(image) for image in images]), torch.tensor(sizes))
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_slice_sees_only_itself(tower):
    sizes = torch.tensor([(3, 4), (2, 5), (3, 4)])
    patches = torch.randint(0, 256, (34, 12), dtype=torch.uint8)
    other = patches.clone()
    other[12:22] = 255 - other[12:22]
    before, after = tower(patches, sizes), tower(other, sizes)
    assert torch.equal(before[:12], after[:12])
    assert torch.equal(before[22:], after[22:])
    assert not torch.isclose(before[12:22], after[12:22]).all(dim=1).any()


def test_slices_of_more_patches_than_the_table_has_rows(tower):
    out = tower(torch.randint(0, 256, (11 * 90, 12), dtype=torch.uint8), torch.tensor([(11, 90)]))
    assert out.shape == (990, 32)
    assert out.isfinite().all()


def test_keys_are_the_published_ones(tower):
    keys = {key for key in tower.state_dict() if ".1." not in key}
    layer = "encoder.layers.0."
    names = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    names += [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    expected = {f"{layer}{name}.{kind}" for name in names for kind in ("weight", "bias")}
    expected |= {"embeddings.patch_embedding.weight", "embeddings.patch_embedding.bias"}
    expected |= {"embeddings.position_embedding.weight", "post_layernorm.weight", "post_layernorm.bias"}
    assert keys == expected
    assert tower.embeddings.patch_embedding.weight.shape == (32, 3, PATCH, PATCH)
