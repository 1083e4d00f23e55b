"""Models of text alone: Megrez-3B-Instruct (a Llama), MiniCPM-2B, and MiniCPM-2B in its Llama form."""

from dataclasses import replace

from train.families.family import Family
from train.families.megrezo import LLAMA_LAYERS

MEGREZ_INSTRUCT = Family(
    name="megrez-instruct",
    recognises=lambda model_type, chat_template: model_type == "llama" and "<|role_start|>" in chat_template,
    model_class="train.modules.text:LlamaForCausalLM",
    processor_class="train.data.text:MegrezTextProcessor",
    rules=(("*", "llm"),),
    flops_function="train.modules.flops:text_flops",
    media={},
    lora_targets={"llm": LLAMA_LAYERS},
)

MINICPM = replace(
    MEGREZ_INSTRUCT,
    name="minicpm",
    recognises=lambda model_type, chat_template: model_type == "minicpm",
    model_class="train.modules.text:MiniCPMForCausalLM",
    processor_class="train.data.text:MiniCPMProcessor",
    stated_keys=(
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "scale_emb",
        "scale_depth",
        "dim_model_base",
    ),
    auto_classes={
        "AutoConfig": "train.modules.text:MiniCPMConfig",
        "AutoModelForCausalLM": "train.modules.text:MiniCPMForCausalLM",
    },
    conversions={"llama": "train.families.conversion:MINICPM_TO_LLAMA"},
)

MINICPM_LLAMA = replace(
    MINICPM,
    name="minicpm-llama",
    recognises=lambda model_type, chat_template: model_type == "llama" and "<用户>" in chat_template,
    model_class="train.modules.text:LlamaForCausalLM",
    stated_keys=(),
    own_keys=frozenset({"minicpm"}),
    auto_classes={},
    conversions={"minicpm": "train.families.conversion:LLAMA_TO_MINICPM"},
)
