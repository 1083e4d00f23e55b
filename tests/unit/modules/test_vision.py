import pytest
import torch
from transformers import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from tests.builders import randomize
from train.modules.vision import VisionTower, axis_buckets

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


def cut(picture: torch.Tensor) -> torch.Tensor:
    """(3, H, W) pixels to flat patches, channel by channel."""
    _, height, width = picture.shape
    grid = picture.reshape(3, height // PATCH, PATCH, width // PATCH, PATCH)
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


@pytest.mark.parametrize("patches", [25, 49, 50, 55, 77, 82, 94, 95, 98])
def test_buckets_differ_from_idefics2_where_rounding_decides(patches):
    boundaries = torch.arange(1 / SIDE, 1.0, 1 / SIDE)
    idefics = torch.bucketize((torch.arange(patches) * (1.0 / torch.tensor(patches))), boundaries, right=True)
    assert axis_buckets(patches, SIDE).tolist() != idefics.tolist()


def test_equals_idefics2_picture_by_picture(tower):
    config = Idefics2VisionConfig(**SIZES, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
    reference = Idefics2VisionTransformer(config).eval()
    reference.load_state_dict(tower.state_dict())
    sizes = [(3, 5), (11, 7), (1, 22), (5, 3), (32, 2)]
    pictures = [torch.randint(0, 256, (3, h * PATCH, w * PATCH), dtype=torch.uint8) for h, w in sizes]
    expected = [reference(((picture.float() - 127.5) / 127.5)[None]).last_hidden_state[0] for picture in pictures]
    out = tower(torch.cat([cut(picture) for picture in pictures]), torch.tensor(sizes))
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
