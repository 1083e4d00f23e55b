import json
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.builders import make_batch, make_sample, mixed_samples, tiny_config, tiny_megrezo
from train.families.megrezo.model import MegrezO, MegrezOConfig

AUDIO_PROJ = ("audio.audio.proj.", "audio.audio.audio_bos_eos_token.")


def module_of(name: str) -> str:
    """Which of the five separately tuned modules a parameter belongs to."""
    if name.startswith("vision."):
        return "vision_encoder" if name.startswith("vision.vpm.") else "vision_proj"
    if name.startswith("audio."):
        return "audio_proj" if name.startswith(AUDIO_PROJ) else "audio_encoder"
    return "llm"


def gradients(model: MegrezO) -> dict[str, Tensor]:
    """The gradient of each of the five modules, as one vector; every parameter must have one."""
    vectors: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        vectors.setdefault(module_of(name), []).append(parameter.grad.flatten())
    model.zero_grad()
    return {name: torch.cat(pieces) for name, pieces in vectors.items()}


@pytest.fixture
def model() -> MegrezO:
    return tiny_megrezo().train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_one_by_one_in_loss_and_gradients(model, checkpointing):
    samples = mixed_samples(model.config)
    alone = [model(make_batch([sample])) for sample in samples]
    sum(out.loss_sum for out in alone).backward()
    expected = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    out = model(make_batch(samples))
    out.loss_sum.backward()
    torch.testing.assert_close(out.loss_sum, sum(one.loss_sum for one in alone), atol=0, rtol=1e-5)
    torch.testing.assert_close(out.token_losses, torch.cat([one.token_losses for one in alone]))
    found = gradients(model)
    assert len(found) == 5
    for name, gradient in found.items():
        assert torch.cosine_similarity(gradient.double(), expected[name].double(), dim=0) >= 0.999999, name
        assert abs(gradient.norm() / expected[name].norm() - 1) <= 1e-5, name


def test_the_loss_is_the_weighted_cross_entropy_of_the_logits(model):
    batch = make_batch(mixed_samples(model.config))
    out = model(batch)
    nll = -model.logits(batch).log_softmax(-1)[batch.target_positions, batch.targets]
    torch.testing.assert_close(out.token_losses, nll)
    torch.testing.assert_close(out.loss_sum, (nll * batch.loss_weights).sum())
    assert out.loss_sum.dtype == torch.float32
    assert not out.token_losses.requires_grad


@pytest.mark.parametrize("replaced", range(5))
def test_a_sample_changes_no_bit_of_the_others(model, replaced):
    samples = mixed_samples(model.config)
    others = list(samples)
    others[replaced] = mixed_samples(model.config, seed=100)[replaced]
    lengths = [len(sample.input_ids) for sample in samples]
    with torch.no_grad():
        before = model.logits(make_batch(samples)).split(lengths)
        after = model.logits(make_batch(others)).split(lengths)
    for n in range(5):
        assert torch.equal(before[n], after[n]) == (n != replaced)


def test_media_stand_at_their_places(model):
    batch = make_batch(mixed_samples(model.config))
    embeddings = model.embed(batch)
    images = model.vision(batch.media["image"].values, batch.media["image"].sizes)
    recordings = model.audio(batch.media["audio"].values, batch.media["audio"].sizes)
    assert torch.equal(embeddings[batch.media["image"].places], images)
    assert torch.equal(embeddings[batch.media["audio"].places], recordings)
    is_text = torch.ones(len(embeddings), dtype=torch.bool)
    is_text[batch.media["image"].places] = is_text[batch.media["audio"].places] = False
    tokens = model.get_input_embeddings()(batch.input_ids)
    assert torch.equal(embeddings[is_text], tokens[is_text])


def test_text_alone_gives_the_towers_zero_gradients(model):
    batch = make_batch([make_sample(model.config)])
    model(batch).loss_sum.backward()
    found = gradients(model)
    assert found.pop("llm").any()
    assert not any(gradient.any() for gradient in found.values())


class Calls:
    """Counts how often each tower runs."""

    def __init__(self, model: MegrezO):
        self.count = {"vpm": 0, "resampler": 0, "audio": 0}
        towers: Iterable[tuple[str, nn.Module]] = (
            ("vpm", model.vision.vpm),
            ("resampler", model.vision.resampler),
            ("audio", model.audio),
        )
        for name, tower in towers:
            tower.register_forward_hook(lambda *_, name=name: self.count.update({name: self.count[name] + 1}))


@pytest.mark.parametrize("which", [[0], [1], [2], [3], [0, 1, 2, 3, 4]])
def test_every_tower_runs_once_in_training_whatever_the_batch_holds(model, which):
    samples = mixed_samples(model.config)
    calls = Calls(model)
    model(make_batch([samples[n] for n in which]))
    assert calls.count == {"vpm": 1, "resampler": 1, "audio": 1}


@pytest.mark.parametrize(("asked", "times"), [(False, 0), (True, 1)])
def test_evaluation_skips_idle_towers_unless_asked(model, asked, times):
    model.eval()
    calls = Calls(model)
    with model.running_every_tower(asked):
        model(make_batch([make_sample(model.config)]))
    assert calls.count == {"vpm": times, "resampler": times, "audio": times}


def test_dummies_change_no_logit(model):
    batch = make_batch([make_sample(model.config)])
    assert torch.equal(model.logits(batch), model.eval().logits(batch))


@pytest.mark.parametrize("tuned", ["vision_encoder", "vision_proj", "llm", "audio_encoder", "audio_proj"])
def test_frozen_modules_make_no_graph_and_get_no_gradient(model, tuned):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(module_of(name) == tuned)
    graphs = {}
    for name, tower in (("vpm", model.vision.vpm), ("vision", model.vision), ("audio", model.audio)):
        tower.register_forward_hook(lambda _, __, out, name=name: graphs.update({name: out.requires_grad}))
    model(make_batch(mixed_samples(model.config))).loss_sum.backward()
    assert graphs == {
        "vpm": tuned == "vision_encoder",
        "vision": tuned in ("vision_encoder", "vision_proj"),
        "audio": tuned in ("audio_encoder", "audio_proj"),
    }
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (module_of(name) == tuned), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_profile_shows_no_backward_work_in_a_frozen_vision_encoder(model, checkpointing):
    """Floating-point work of forward and backward, as torch counts it module by module."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(mixed_samples(model.config))
    work = {}
    for tuned in ("vision_encoder", "vision_proj"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(module_of(name) == tuned)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(batch)
        with FlopCounterMode(display=False) as both:
            model(batch).loss_sum.backward()
        for tower in ("vpm", "resampler"):
            counts = [sum(c.get_flop_counts()[f"MegrezO.vision.{tower}"].values()) for c in (forward, both)]
            work[tuned, tower] = counts[1] / counts[0]
    assert work["vision_proj", "vpm"] == 1  # the forward, and no more
    assert work["vision_encoder", "vpm"] > 2.5
    assert work["vision_proj", "resampler"] > 1.5


def test_generation_equals_the_argmax_of_uncached_packs(model):
    model.eval()
    prompts = mixed_samples(model.config)
    answers = model.generate(make_batch(prompts), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert [len(answer) for answer in answers] == [6] * 5
    for prompt, answer in zip(prompts, answers, strict=True):
        grown = prompt
        for token in answer:
            batch = make_batch([grown])
            assert model.logits(batch)[-1].argmax() == token
            batch.input_ids = torch.cat([batch.input_ids, token[None]])
            grown.input_ids = batch.input_ids
            grown.labels = torch.cat([grown.labels, torch.tensor([-100])])
            grown.loss_weights = torch.cat([grown.loss_weights, torch.zeros(1)])


def test_generation_stops_before_end_of_sequence(model):
    model.eval()
    batch = make_batch(mixed_samples(model.config))
    free = model.generate(batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    end = int(free[0][2])
    stopped = model.generate(batch, max_new_tokens=6, do_sample=False, eos_token_id=[end, 127])
    for whole, cut in zip(free, stopped, strict=True):
        expected = whole.tolist()
        ends = [place for place, token in enumerate(expected) if token in (end, 127)]
        assert cut.tolist() == expected[: ends[0] if ends else None]


def test_without_a_batch_it_is_the_llm(model):
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(input_ids=ids).logits, model.llm(input_ids=ids).logits)


def test_full_size_has_the_model_cards_counts():
    with torch.device("meta"):
        model = MegrezO(MegrezOConfig())

    def billions(*modules: nn.Module) -> float:
        return sum(p.numel() for module in modules for p in module.parameters()) / 1e9

    llm, audio = model.llm, model.audio.audio
    assert round(billions(llm.model.layers, llm.model.norm), 2) == 2.29
    assert round(billions(llm.model.embed_tokens), 2) == 0.31
    assert round(billions(llm.lm_head), 2) == 0.31
    assert round(billions(model.vision.vpm), 2) == 0.42
    assert round(billions(model.vision.resampler), 3) == 0.036
    assert round(billions(audio) + audio.positional_embedding.numel() / 1e9, 2) == 0.64
    assert round(billions(audio.proj, audio.audio_bos_eos_token), 3) == 0.003


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_in_shards_it_loads_whole(model, tmp_path, dtype):
    model.eval().to(dtype).save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert "audio.audio.positional_embedding" in index["weight_map"]
    loaded, report = MegrezO.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(p.dtype == dtype for p in loaded.parameters())
    assert loaded.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    batch = make_batch(mixed_samples(model.config))
    assert torch.equal(loaded.logits(batch), model.logits(batch))


def test_a_checkpoint_without_positions_gets_whispers(model, tmp_path):
    state = model.state_dict()
    expected = state.pop("audio.audio.positional_embedding")
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = MegrezO.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.audio.audio.positional_embedding, expected)


def test_the_published_configuration_survives_a_round_trip(tmp_path):
    published = {
        "model_type": "megrezo",
        "architectures": ["MegrezO"],
        "auto_map": {"AutoConfig": "configuration_megrezo.MegrezOConfig"},
        "rope_theta": 123456.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "eos_token_id": 120005,
        "pad_token_id": 0,
        "drop_vision_last_layer": True,
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "model_type": "siglip"},
        "audio_config": {"n_layer": 3, "unknown_to_us": 1},
        "somebody_elses_key": [1, 2],
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = MegrezOConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    for read in (config, MegrezOConfig.from_pretrained(tmp_path / "again")):
        assert read.rope_parameters["rope_theta"] == 123456.0
        assert read.llama_config().rope_parameters["rope_theta"] == 123456.0
        assert read.dtype == torch.bfloat16
        assert read.auto_map == published["auto_map"]
        assert read.somebody_elses_key == [1, 2]
        assert read.vision_config == published["vision_config"]
        assert read.audio_config == published["audio_config"]
        assert read.vision_arguments()["num_hidden_layers"] == 26
        assert read.audio_arguments()["n_layer"] == 3


def test_random_weights_have_sane_scales():
    torch.manual_seed(0)
    model = MegrezO(tiny_config())
    for name, parameter in model.named_parameters():
        wanted = {"proj": 64**-0.5, "query": 1.0, "in_proj_weight": 4 * (2 / (4 * 64)) ** 0.5}
        if "resampler" in name and (std := wanted.get(name.split(".")[-1])):
            assert parameter.std().item() == pytest.approx(std, rel=0.15), name
        elif parameter.dim() > 1:
            assert 0.017 < parameter.std() < 0.023, name
        elif "norm" in name or "ln_" in name or "_ln" in name:
            assert parameter.eq(float(name.endswith("weight"))).all(), name
        else:
            assert not parameter.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_static_cache_gives_the_same_answers(model, dtype):
    batch = make_batch(mixed_samples(model.config))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    model.eval().to(dtype)
    static = model.generate(batch, cache_implementation="static", disable_compile=True, **options)
    assert [answer.tolist() for answer in static] == [a.tolist() for a in model.generate(batch, **options)]
