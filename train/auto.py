"""Makes transformers' Auto classes know our models: `import train.auto`, then `AutoModelForCausalLM` and its kin."""

from train.families.registry import FAMILIES

for family in FAMILIES:
    family.register_auto_classes()
