"""Megrez-3B-Omni: Llama, SigLIP tower, resampler, Whisper-style audio tower."""

from train.families.family import LLAMA_LAYERS, Family
from train.modules.trainable import FROZEN

MEGREZO = Family(
    name="megrezo",
    recognises=lambda model_type, chat_template: model_type == "megrezo",
    model_class="train.families.megrezo.model:MegrezO",
    processor_class="train.families.megrezo.processor:MegrezOProcessor",
    rules=(
        ("audio.audio.positional_embedding", FROZEN),
        ("audio.audio.proj.*", "audio_proj"),
        ("audio.audio.audio_bos_eos_token.*", "audio_proj"),
        ("audio.audio.*", "audio_encoder"),
        ("vision.vpm.*", "vision_encoder"),
        ("vision.resampler.*", "vision_proj"),
        ("llm.*", "llm"),
    ),
    flops_function="train.families.megrezo.flops:megrezo_flops",
    media={"vision_encoder": "image", "vision_proj": "image", "audio_encoder": "audio", "audio_proj": "audio"},
    lora_targets={
        "llm": LLAMA_LAYERS,
        "vision_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "vision_proj": ("kv_proj",),
        "audio_encoder": ("query", "key", "value", "out", "mlp.0", "mlp.2"),
        "audio_proj": ("proj",),
    },
    stated_keys=(
        *("num_attention_heads", "num_hidden_layers", "rms_norm_eps", "rope_theta|rope_parameters"),
        *("vision_config.num_attention_heads", "vision_config.num_hidden_layers"),
        *("audio_config.n_head", "audio_config.n_layer"),
    ),
    auto_classes={
        "AutoConfig": "train.families.megrezo.model:MegrezOConfig",
        "AutoModel": "train.families.megrezo.model:MegrezO",
        "AutoModelForCausalLM": "train.families.megrezo.model:MegrezO",
        "AutoProcessor": "train.families.megrezo.processor:MegrezOProcessor",
        "AutoImageProcessor": "train.families.megrezo.processor:MegrezOImageProcessor",
    },
)
