"""Qwen2.5-Omni: the thinker is trained; the talker and the vocoder of its speech are carried along."""

from train.families.family import LLAMA_LAYERS, Family
from train.modules.trainable import FROZEN

QWEN_OMNI = Family(
    name="qwen-omni",
    recognises=lambda model_type, chat_template: model_type == "qwen2_5_omni",
    model_class="train.families.qwen_omni.model:Qwen2_5OmniForConditionalGeneration",
    processor_class="train.families.qwen_omni.processor:QwenOmniProcessor",
    rules=(
        # It belongs to the checkpoint, and nothing uses it: DDP and ZeRO would wait for its gradient.
        ("thinker.audio_tower.audio_bos_eos_token.*", FROZEN),
        ("thinker.audio_tower.proj.*", "audio_proj"),
        ("thinker.audio_tower.*", "audio_encoder"),
        ("thinker.visual.merger.*", "vision_proj"),
        ("thinker.visual.*", "vision_encoder"),
        ("thinker.*", "llm"),
    ),
    flops_function="train.families.qwen_omni.flops:qwen_omni_flops",
    stock_logits_function="train.families.qwen_omni.stock:thinker_logits",
    media={"vision_encoder": "image", "vision_proj": "image", "audio_encoder": "audio", "audio_proj": "audio"},
    lora_targets={
        "llm": LLAMA_LAYERS,
        "vision_encoder": ("attn.q", "attn.k", "attn.v", "attn.proj", "gate_proj", "up_proj", "down_proj"),
        "vision_proj": ("mlp.0", "mlp.2"),
        "audio_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "audio_proj": ("proj",),
    },
    stated_keys=(
        "thinker_config",
        *(f"thinker_config.{part}_config" for part in ("text", "vision", "audio")),
    ),
    # Which the published files state, and nothing of the thinker reads.
    own_keys=frozenset(
        {"talker_config", "token2wav_config", "enable_talker", "vision_start_token_id", "vision_end_token_id"}
        | {"vision_token_id", "ignore_index", "init_std", "num_hidden_layers", "embed_dim", "in_chans"}
        | {"spatial_patch_size", "tokens_per_second", "encoder_layerdrop"}
    ),
)
