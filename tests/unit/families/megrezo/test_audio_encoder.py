import pytest
import torch
from torch.nn.functional import avg_pool1d
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.builders import randomize
from train.families.megrezo.audio import AudioEncoder, sinusoids
from train.families.megrezo.geometry import audio_places, mel_frames

WHISPER_NAMES = {
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}


def encoder(**changes) -> AudioEncoder:
    torch.manual_seed(0)
    sizes = {"n_mels": 16, "n_ctx": 1500, "n_state": 32, "n_head": 2, "n_layer": 2, "output_dim": 24}
    built = AudioEncoder(**sizes | changes)
    randomize(built)
    return built.eval()


def whisper_of(ours: AudioEncoder) -> WhisperEncoder:
    config = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128, num_mel_bins=16
    )
    state = {"embed_positions.weight": ours.positional_embedding}
    for key, value in ours.state_dict().items():
        if key.startswith("blocks."):
            _, number, name, kind = (*key.split(".", 2)[:2], *key.split(".", 2)[2].rsplit(".", 1))
            state[f"layers.{number}.{WHISPER_NAMES[name]}.{kind}"] = value
        elif key.startswith("conv"):
            state[key] = value
        elif key.startswith("ln_post"):
            state[key.replace("ln_post", "layer_norm")] = value
    reference = WhisperEncoder(config).eval()
    reference.load_state_dict(state)
    return reference


def test_equals_whisper_on_30_second_clips():
    ours = encoder()
    whisper = whisper_of(ours)
    # Whisper norms before the pool of the published encoder: the norm is taken off and applied after.
    norm, whisper.layer_norm = whisper.layer_norm, torch.nn.Identity()
    mel = torch.randn(2, 16, 3000)
    frames = whisper(mel).last_hidden_state.transpose(1, 2)
    expected = ours.proj(norm(avg_pool1d(frames, 2).transpose(1, 2)))
    out = ours(torch.cat(list(mel), dim=1).T, torch.tensor([3000, 3000])).unflatten(0, (2, 752))
    torch.testing.assert_close(out[:, 1:-1], expected, atol=1e-4, rtol=1e-4)
    bos, eos = ours.audio_bos_eos_token.weight
    assert torch.equal(out[1, 0], bos)
    assert torch.equal(out[1, -1], eos)


def test_clips_of_any_length_equal_clip_by_clip():
    ours = encoder()
    frames = [4, 30, 6, 30, 122]
    clips = [torch.randn(16, length) for length in frames]
    together = ours(torch.cat(clips, dim=1).T, torch.tensor(frames))
    alone = [ours(clip.T, torch.tensor([length])) for clip, length in zip(clips, frames, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_clip_alone_is_whisper_with_zeros_at_its_edges():
    ours = encoder()
    mel = torch.randn(16, 10)
    hidden = torch.nn.functional.gelu(ours.conv1(mel[None]))
    expected = torch.nn.functional.gelu(ours.conv2(hidden))[0].T
    torch.testing.assert_close(ours._convolve(mel, [10]), expected)


def test_neighbours_change_no_bit():
    ours = encoder()
    mel = torch.randn(16, 40)
    other = mel.clone()
    other[:, 10:24] = torch.randn(16, 14)
    frames = torch.tensor([10, 14, 16])
    before, after = ours(mel.T, frames), ours(other.T, frames)
    first, last = 2 + 2, 4 + 2
    assert torch.equal(before[:first], after[:first])
    assert torch.equal(before[-last:], after[-last:])
    assert not torch.isclose(before[first + 1 : -last - 1], after[first + 1 : -last - 1]).all(dim=1).any()


@pytest.mark.parametrize("samples", [16_000, 12_345, 480_000, 1_000])
@pytest.mark.parametrize("bos_eos", [True, False])
def test_places_are_those_of_geometry(samples, bos_eos):
    ours = encoder(add_audio_bos_eos_token=bos_eos)
    frames = mel_frames(samples)
    out = ours(torch.randn(frames, 16), torch.tensor([frames]))
    assert out.shape == (audio_places(samples, bos_eos=bos_eos), 24)
    assert ours.places(torch.tensor([frames])).tolist() == [len(out)]


def test_positions_are_a_buffer_of_the_checkpoint():
    ours = encoder()
    assert "positional_embedding" in ours.state_dict()
    assert "positional_embedding" not in dict(ours.named_parameters())
    torch.testing.assert_close(
        sinusoids(3, 4)[2],
        torch.tensor([0.9092974, 0.0002, -0.4161468, 1.0]),  # sin and cos of 2 at 1 and 1/10000
        atol=1e-6,
        rtol=0,
    )


def test_keys_are_the_published_ones():
    keys = set(encoder(n_layer=1).state_dict())
    expected = {"positional_embedding", "audio_bos_eos_token.weight", "blocks.0.attn.key.weight"}
    biased = ["conv1", "conv2", "ln_post", "proj"]
    biased += [f"blocks.0.{name}" for name in WHISPER_NAMES if name != "attn.key"]
    expected |= {f"{name}.{kind}" for name in biased for kind in ("weight", "bias")}
    assert keys == expected
