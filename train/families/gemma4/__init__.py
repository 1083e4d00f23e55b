"""Gemma 4 E2B and E4B: text, images and audio in, text out."""

from train.families.family import LLAMA_LAYERS, Family

_TOWER_LAYERS = ("q_proj.linear", "k_proj.linear", "v_proj.linear")

GEMMA4 = Family(
    name="gemma4",
    recognises=lambda model_type, chat_template: model_type == "gemma4",
    model_class="train.families.gemma4.model:Gemma4ForConditionalGeneration",
    processor_class="train.families.gemma4.processor:Gemma4Processor",
    rules=(
        ("model.vision_tower.*", "vision_encoder"),
        ("model.embed_vision.*", "vision_proj"),
        ("model.audio_tower.*", "audio_encoder"),
        ("model.embed_audio.*", "audio_proj"),
        # Nearly half of the model: its master weights, gradients and moments take 38 GB.
        ("model.language_model.embed_tokens_per_layer.*", "per_layer_table"),
        ("model.language_model.*", "llm"),
        ("lm_head.*", "llm"),
    ),
    flops_function="train.families.gemma4.flops:gemma4_flops",
    media={"vision_encoder": "image", "vision_proj": "image", "audio_encoder": "audio", "audio_proj": "audio"},
    stock_logits_function="train.families.gemma4.stock:gemma4_logits",
    lora_targets={
        "llm": (*LLAMA_LAYERS, "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
        "vision_encoder": (
            *(*_TOWER_LAYERS, "o_proj.linear"),
            *("gate_proj.linear", "up_proj.linear", "down_proj.linear"),
        ),
        "vision_proj": ("embedding_projection",),
        "audio_encoder": (
            *(*_TOWER_LAYERS, "post.linear"),
            *("ffw_layer_1.linear", "ffw_layer_2.linear", "linear_start.linear", "linear_end.linear"),
        ),
        "audio_proj": ("embedding_projection",),
        "per_layer_table": (),  # an embedding
    },
    stated_keys=tuple(f"{part}_config" for part in ("text", "vision", "audio")),
    compiles=False,  # layers hand keys and values on through a mapping that torch.compile does not follow
    own_keys=frozenset(
        # Which transformers turns into `per_layer_config`, or writes as that.
        {"global_head_dim", "num_global_key_value_heads", "per_layer_config"}
        # Which the published files state for processors and serving.
        | {"vision_soft_tokens_per_image", "image_seq_length", "audio_seq_length"}
    ),
)
