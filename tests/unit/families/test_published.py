"""Published configurations, literally: every key is obeyed in its published type, or its value refused by name."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from tests.unit.data.builders import talk, wav
from tests.unit.families.published import ABSENT, NAMES, PUBLISHED, add_tokenizer, changed
from train.errors import CheckpointError
from train.families.family import Family
from train.families.minicpm.processor import MiniCPMProcessor
from train.families.registry import find

OMNI, INSTRUCT, MINICPM, MINICPM_LLAMA = NAMES


def billions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e9


def skeleton(folder: Path) -> Any:
    return find(folder).skeleton(folder)


def test_megrez_3b_omni_has_the_published_parts() -> None:
    model = skeleton(PUBLISHED / OMNI)
    llm, audio = model.llm, model.audio.audio
    connector = billions(audio.proj) + billions(audio.audio_bos_eos_token)
    assert [round(billions(part), 2) for part in (llm.model.layers, llm.model.embed_tokens, llm.lm_head)] == [
        2.29,
        0.31,
        0.31,
    ]
    assert round(billions(model.vision.vpm), 2) == 0.42
    assert round(billions(model.vision.resampler), 3) == 0.036
    assert round(billions(audio) - connector, 2) == 0.64
    assert round(connector, 3) == 0.003
    assert llm.model.embed_tokens.weight is not llm.lm_head.weight
    assert len(model.vision.vpm.encoder.layers) == 27


@pytest.mark.parametrize(
    ("name", "family", "parameters"),
    [
        (
            INSTRUCT,
            "megrez-instruct",
            2 * 122_880 * 2560 + 32 * (2 * 2560**2 + 2 * 2560 * 640 + 3 * 2560 * 7168 + 5120),
        ),
        (MINICPM, "minicpm", 122_753 * 2304 + 40 * (4 * 2304**2 + 3 * 2304 * 5760 + 4608)),
        (MINICPM_LLAMA, "minicpm-llama", 2 * 122_753 * 2304 + 40 * (4 * 2304**2 + 3 * 2304 * 5760 + 4608)),
    ],
)
def test_text_models_have_the_published_size(name: str, family: str, parameters: int) -> None:
    model = skeleton(PUBLISHED / name)
    assert find(PUBLISHED / name).name == family
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters + model.config.hidden_size
    if name == INSTRUCT:
        assert round(billions(model), 2) == 2.92
    if name == MINICPM:
        scales = (model.config.embedding_multiplier, model.config.residual_multiplier, model.config.logits_scaling)
        assert scales == (12, pytest.approx(1.4 / 40**0.5), 9)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_folder_is_taken_as_it_is(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = add_tokenizer(changed(name, tmp_path))
    family = find(folder)
    with caplog.at_level(logging.WARNING, logger="train"):
        config = family.config(folder)
    assert not caplog.records
    processor = family.load_processor(folder)
    asked = processor.encode(talk(("user", "q"), ("assistant", "a"))).input_ids.tolist()
    if name.startswith("megrez"):
        special = [token for token in asked if token >= 120_000]
        assert special == 3 * [120_003, 120_004, 120_005]  # system, user, assistant
        assert config.rope_parameters["rope_theta"] == 5e6
    else:
        assert (asked[0], asked[-1]) == (1, 2)
        assert config.rope_parameters["rope_theta"] == 1e4
    assert config.rope_parameters["rope_type"] == "default"
    assert config.dtype == torch.bfloat16


LLAMA_REFUSED: list[tuple[str, Any, str]] = [
    ("hidden_act", "gelu", "hidden_act is 'gelu', where only 'silu' is implemented"),
    ("attention_dropout", 0.1, "attention_dropout is 0.1, where only 0.0"),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_scaling's type is 'dynamic'"),
    ("rope_scaling", {"rope_type": "xpos", "factor": 2.0}, "rope_scaling's type is 'xpos'"),
    ("rope_scaling", {"type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("num_key_value_heads", 7, "num_key_value_heads is 7, which does not divide"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}, "quantization_config is set"),
    ("vocab_size", "122880", "'vocab_size' expected int, got str"),
    ("hidden_size", 2560.0, "'hidden_size' expected int, got float"),
    ("rms_norm_eps", "1e-5", "'rms_norm_eps' expected float, got str"),
    ("tie_word_embeddings", "no", "'tie_word_embeddings' expected bool, got str"),
    ("attention_bias", 1, "'attention_bias' expected bool, got int"),
]
MINICPM_REFUSED: list[tuple[str, Any, str]] = [
    ("attention_bias", True, "attention_bias is True, where only False"),
    ("scale_emb", "12", "scale_emb is '12', where it is a number above 0"),
    ("scale_emb", 0, "scale_emb is 0, where it is a number above 0"),
    ("scale_depth", None, "scale_depth is None"),
    ("dim_model_base", 256.0, "dim_model_base is 256.0, where it is a whole number from 1"),
    ("scale_emb", ABSENT, "lacks 'scale_emb'"),
    ("scale_depth", ABSENT, "lacks 'scale_depth'"),
    ("dim_model_base", ABSENT, "lacks 'dim_model_base'"),
]
OMNI_REFUSED: list[tuple[str, Any, str]] = [
    ("tie_word_embeddings", True, "tie_word_embeddings is True, where only False"),
    ("query_num", "64", "query_num is '64', where it is a whole number from 1"),
    ("query_num", 0, "query_num is 0"),
    ("vision_batch_size", True, "vision_batch_size is True"),
    ("vision_batch_size", 0, "vision_batch_size is 0"),
    ("patch_size", 16, "vision_config.patch_size is 14, where only 16"),
    ("drop_vision_last_layer", 1, "drop_vision_last_layer is 1, where it is true or false"),
    ("vision_config", None, "vision_config"),
    ("vision_config__hidden_act", "gelu", "vision_config.hidden_act is 'gelu', where only 'gelu_pytorch_tanh'"),
    ("vision_config__num_channels", 1, "vision_config.num_channels is 1, where only 3"),
    ("vision_config__attention_dropout", 0.1, "vision_config.attention_dropout is 0.1"),
    ("vision_config__num_attention_heads", 7, "vision_config.num_attention_heads is 7, which does not divide 1152"),
    ("vision_config__num_hidden_layers", "27", "vision_config.num_hidden_layers is '27'"),
    ("vision_config__num_attention_heads", ABSENT, "lacks 'vision_config.num_attention_heads'"),
    ("audio_config", [], "audio_config"),
    ("audio_config__avg_pool", 0, "audio_config.avg_pool is 0"),
    ("audio_config__avg_pool", -2, "audio_config.avg_pool is -2"),
    ("audio_config__avg_pool", 2.0, "audio_config.avg_pool is 2.0"),
    ("audio_config__avg_pool", "true", "audio_config.avg_pool is 'true'; it must be true"),
    ("audio_config__avg_pool", None, "audio_config.avg_pool is None"),
    ("audio_config__add_audio_bos_eos_token", 1, "audio_config.add_audio_bos_eos_token is 1"),
    ("audio_config__output_dim", 2048, "audio_config.output_dim is 2048, where only 2560"),
    ("audio_config__n_head", 7, "audio_config.n_head is 7, which does not divide 1280"),
    ("audio_config__n_mels", "128", "audio_config.n_mels is '128'"),
    ("audio_config__n_head", ABSENT, "lacks 'audio_config.n_head'"),
    ("rope_theta", ABSENT, "lacks 'rope_theta'"),
    ("rms_norm_eps", ABSENT, "lacks 'rms_norm_eps'"),
]
REFUSED = [(name, *case) for name in NAMES for case in LLAMA_REFUSED]
REFUSED += [(OMNI, *case) for case in OMNI_REFUSED] + [(MINICPM, *case) for case in MINICPM_REFUSED]


@pytest.mark.parametrize(("name", "key", "value", "said"), REFUSED)
def test_a_value_that_is_not_implemented_is_refused_by_name(
    name: str, key: str, value: Any, said: str, tmp_path: Path
) -> None:
    folder = changed(name, tmp_path, **{key: value})
    for use in (Family.config, Family.skeleton, Family.load_processor, Family.load_model):
        with pytest.raises(CheckpointError) as caught:
            use(find(folder), folder)
        assert said in str(caught.value)
        assert str(folder / "config.json") in str(caught.value)


def test_all_faults_are_told_together(tmp_path: Path) -> None:
    folder = changed(OMNI, tmp_path, hidden_act="gelu", vision_config__num_channels=1, audio_config__avg_pool="yes")
    with pytest.raises(CheckpointError, match=r"hidden_act is 'gelu'.*num_channels is 1.*avg_pool is 'yes'"):
        find(folder).config(folder)


def test_a_key_that_nothing_reads_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = changed(OMNI, tmp_path, slice_mode=True, sliding_window=128, audio_config__dropout=0.1)
    with caplog.at_level(logging.WARNING, logger="train"):
        find(folder).skeleton(folder)
        find(folder).skeleton(folder)
    assert [record.message for record in caplog.records] == [
        f"{folder / 'config.json'}: keys that change nothing here: audio_config.dropout, slice_mode, sliding_window"
    ]


OBEYED: list[tuple[str, str, Any, str, Any]] = [
    (OMNI, "drop_vision_last_layer", True, "len(m.vision.vpm.encoder.layers)", 26),
    (OMNI, "vision_config__layer_norm_eps", 1e-5, "m.vision.vpm.post_layernorm.eps", 1e-5),
    (OMNI, "vision_config__image_size", 448, "len(m.vision.vpm.embeddings.position_embedding.weight)", 32 * 32),
    (OMNI, "vision_config__num_attention_heads", 12, "m.vision.vpm.encoder.layers[0].self_attn.num_heads", 12),
    (OMNI, "query_num", 32, "m.vision.resampler.query.shape[0]", 32),
    (OMNI, "vision_batch_size", 1, "len(m.vision.vpm.encoder.layers)", 27),
    (OMNI, "audio_config__avg_pool", True, "m.audio.audio.avg_pool", 2),
    (OMNI, "audio_config__avg_pool", False, "m.audio.audio.avg_pool", 1),
    (OMNI, "audio_config__avg_pool", 5, "m.audio.audio.avg_pool", 5),
    (OMNI, "audio_config__add_audio_bos_eos_token", False, "m.audio.audio.audio_bos_eos_token", None),
    (OMNI, "audio_config__n_layer", 24, "len(m.audio.audio.blocks)", 24),
    (OMNI, "audio_config__n_head", 10, "m.audio.audio.blocks[0].attn.n_head", 10),
    (OMNI, "audio_config__n_ctx", 3000, "len(m.audio.audio.positional_embedding)", 3000),
    (OMNI, "audio_config__n_mels", 80, "m.audio.audio.conv1.in_channels", 80),
    (OMNI, "pad_token_id", 7, "m.llm.model.embed_tokens.padding_idx", 7),
    (OMNI, "rms_norm_eps", 1e-6, "m.llm.model.norm.variance_epsilon", 1e-6),
    (OMNI, "attention_bias", True, "m.llm.model.layers[0].self_attn.o_proj.bias is not None", True),
    (OMNI, "mlp_bias", True, "m.llm.model.layers[0].mlp.up_proj.bias is not None", True),
    (OMNI, "head_dim", 128, "m.llm.model.layers[0].self_attn.q_proj.out_features", 40 * 128),
    (OMNI, "num_key_value_heads", 8, "m.llm.model.layers[0].self_attn.k_proj.out_features", 8 * 64),
    (OMNI, "eos_token_id", [7, 8], "m.generation_config.eos_token_id", [7, 8]),
    (INSTRUCT, "tie_word_embeddings", True, "m.lm_head.weight is m.model.embed_tokens.weight", True),
    (INSTRUCT, "rope_theta", 7.0, "m.model.rotary_emb.config.rope_parameters['rope_theta']", 7.0),
    (INSTRUCT, "pretraining_tp", 2, "len(m.model.layers)", 32),
    (MINICPM, "tie_word_embeddings", False, "m.lm_head.weight is m.model.embed_tokens.weight", False),
    (MINICPM, "scale_emb", 1, "m.model.embedding_multiplier", 1),
    (MINICPM, "scale_depth", 2, "m.model.layers[0].residual_multiplier", 2 / 40**0.5),
    (MINICPM, "dim_model_base", 2304, "m.config.logits_scaling", 1),
    (MINICPM, "num_key_value_heads", 12, "m.model.layers[0].self_attn.k_proj.out_features", 12 * 64),
]


@pytest.mark.parametrize(("name", "key", "value", "where", "expected"), OBEYED)
def test_a_value_is_obeyed(name: str, key: str, value: Any, where: str, expected: Any, tmp_path: Path) -> None:
    model = skeleton(changed(name, tmp_path, **{key: value}))
    assert eval(where, {"m": model, "len": len}) == expected


@pytest.mark.parametrize(("avg_pool", "places"), [(True, 752), (2, 752), (False, 1502), (1, 1502), (5, 302)])
def test_places_of_a_clip_of_30_seconds(avg_pool: bool | int, places: int, tmp_path: Path) -> None:
    folder = add_tokenizer(changed(OMNI, tmp_path, audio_config__avg_pool=avg_pool))
    processor = find(folder).load_processor(folder)
    sample = processor.encode(talk(("user", [("audio", wav(30.0)), ("text", "?")]), ("assistant", "a")))
    assert len(sample.media["audio"].places) == places
    assert (sample.input_ids == 120_001).sum() == places
    assert skeleton(folder).audio.audio.places(sample.media["audio"].sizes).tolist() == [places]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("max_slice_nums", 0, "max_slice_nums is 0, where it is a whole number from 1"),
        ("max_slice_nums", "9", "max_slice_nums is '9'"),
        ("scale_resolution", 448.0, "scale_resolution is 448.0"),
        ("use_image_id", "true", "use_image_id is 'true', where it is true or false"),
        ("slice_mode", 1, "slice_mode is 1"),
        ("norm_mean", [0.48, 0.46, 0.41], "norm_mean is [0.48, 0.46, 0.41], where only [0.5, 0.5, 0.5]"),
        ("norm_std", [0.27, 0.26, 0.28], "norm_std is"),
        ("sampling_rate", 24_000, "sampling_rate is 24000, where only 16000"),
        ("hop_length", 320, "hop_length is 320, where only 160"),
        ("patch_size", 16, "patch_size is 16, where only 14"),
        ("image_feature_size", 32, "image_feature_size is 32, where only 64"),
    ],
)
def test_settings_of_the_processor_are_refused_by_name(key: str, value: Any, said: str, tmp_path: Path) -> None:
    folder = add_tokenizer(changed(OMNI, tmp_path, "preprocessor_config.json", **{key: value}))
    with pytest.raises(CheckpointError) as caught:
        find(folder).load_processor(folder)
    assert said in str(caught.value)
    assert "preprocessor_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "where", "expected"),
    [
        ("use_image_id", False, "len(p.image_id_tokens(0))", 0),
        ("use_image_id", True, "len(p.image_id_tokens(0))", 3),
        ("slice_mode", False, "p.image_processor.slice_settings.layout(1480, 720).slices", 1),
        ("max_slice_nums", 2, "p.image_processor.slice_settings.layout(1480, 720).grid", (2, 1)),
        ("scale_resolution", 448, "p.image_processor.slice_settings.layout(1480, 720).slices", 7),
        ("norm_mean", [0.5, 0.5, 0.5], "p.image_processor.image_feature_size", 64),
    ],
)
def test_settings_of_the_processor_are_obeyed(key: str, value: Any, where: str, expected: Any, tmp_path: Path) -> None:
    folder = add_tokenizer(changed(OMNI, tmp_path, "preprocessor_config.json", **{key: value}))
    assert eval(where, {"p": find(folder).load_processor(folder), "len": len}) == expected


def test_a_tokenizer_that_ends_texts_is_refused(tmp_path: Path) -> None:
    folder = add_tokenizer(changed(MINICPM, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder, add_eos_token=True)
    with pytest.raises(CheckpointError, match="set add_eos_token to false"):
        MiniCPMProcessor(tokenizer)


@pytest.mark.parametrize("turns", [[("user", "up?")], [("system", "Be brief."), ("user", " up? ")]])
def test_minicpms_prompt_is_its_published_chat_templates(turns: list[tuple[str, str]], tmp_path: Path) -> None:
    """The template's text, tokenised as a whole, as the published `chat` does it."""
    folder = add_tokenizer(changed(MINICPM, tmp_path))
    processor = find(folder).load_processor(folder)
    messages = [{"role": role, "content": content} for role, content in turns]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    asked = processor.encode(talk(*turns), generation_prompt=True).input_ids.tolist()
    assert asked == processor.tokenizer(text)["input_ids"]
