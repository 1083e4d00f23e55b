"""A family as someone else would add it: a Llama that sees one colour of each image. See `test_registry.py`."""

from train.families.family import LLAMA_LAYERS, Family

FOURTH = Family(
    name="fourth",
    recognises=lambda model_type, chat_template: model_type == "fourth",
    model_class="tests.unit.families.fourth.model:FourthForCausalLM",
    processor_class="tests.unit.families.fourth.processor:FourthProcessor",
    rules=(("vision.encoder.*", "vision_encoder"), ("vision.projector.*", "vision_proj"), ("llm.*", "llm")),
    flops_function="train.modules.flops:text_flops",
    media={"vision_encoder": "image", "vision_proj": "image"},
    lora_targets={"llm": LLAMA_LAYERS},
)
