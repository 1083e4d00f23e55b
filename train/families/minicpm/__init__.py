"""MiniCPM-2B, as published and in its Llama form."""

from dataclasses import replace

from train.families.family import LLAMA_LAYERS, Family

MINICPM = Family(
    name="minicpm",
    recognises=lambda model_type, chat_template: model_type == "minicpm",
    model_class="train.families.minicpm.model:MiniCPMForCausalLM",
    processor_class="train.families.minicpm.processor:MiniCPMProcessor",
    stated_keys=(
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "scale_emb",
        "scale_depth",
        "dim_model_base",
    ),
    rules=(("*", "llm"),),
    flops_function="train.modules.flops:text_flops",
    media={},
    lora_targets={"llm": LLAMA_LAYERS},
    auto_classes={
        "AutoConfig": "train.families.minicpm.model:MiniCPMConfig",
        "AutoModelForCausalLM": "train.families.minicpm.model:MiniCPMForCausalLM",
    },
    conversions={"llama": "train.families.minicpm.conversion:MINICPM_TO_LLAMA"},
)

MINICPM_LLAMA = replace(
    MINICPM,
    name="minicpm-llama",
    recognises=lambda model_type, chat_template: model_type == "llama" and "<用户>" in chat_template,
    model_class="train.modules.text:LlamaForCausalLM",
    stated_keys=(),
    own_keys=frozenset({"minicpm"}),
    auto_classes={},
    conversions={"minicpm": "train.families.minicpm.conversion:LLAMA_TO_MINICPM"},
)
