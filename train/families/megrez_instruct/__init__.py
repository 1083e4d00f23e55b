"""Megrez-3B-Instruct: a Llama in Megrez's chat form."""

from train.families.family import LLAMA_LAYERS, Family

MEGREZ_INSTRUCT = Family(
    name="megrez-instruct",
    recognises=lambda model_type, chat_template: model_type == "llama" and "<|role_start|>" in chat_template,
    model_class="train.modules.text:LlamaForCausalLM",
    processor_class="train.families.megrez_instruct.processor:MegrezTextProcessor",
    rules=(("*", "llm"),),
    flops_function="train.modules.flops:text_flops",
    media={},
    lora_targets={"llm": LLAMA_LAYERS},
)
