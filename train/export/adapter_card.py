"""README.md of an exported adapter: what it is, the model it belongs to, and how peft loads it."""

import json
from pathlib import Path

from train.families.family import Family
from train.modules.adapters import LoraSettings

_CARD = """\
---
base_model: {quoted}
library_name: peft
---

# {kind} adapter, trained with OmniTune

It belongs to the model in `{base}`, and to no other.

- Rank {rank}, alpha {alpha:g}, on {targets}.
- Trained in full beside it, and stored here too: {full}.
- Stored in float32. The folder above this one holds the same model with the adapter merged: it needs neither this
  folder nor peft.

```python
{imports}
base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def write_card(folder: Path, family: Family, base: Path, lora: LoraSettings, fully_tuned: tuple[str, ...]) -> None:
    """Replace peft's blank form in the folder of an adapter.

    base: folder of the model that the adapter was trained on; fully_tuned: modules that were tuned in full beside it.
    """
    ours = ["import omnitune  # lets transformers know the model's classes"] if family.auto_classes else []
    libraries = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM"]
    card = _CARD.format(
        kind="DoRA" if lora.use_dora else "LoRA",
        quoted=json.dumps(str(base), ensure_ascii=False),
        base=str(base),
        rank=lora.rank,
        alpha=lora.alpha,
        targets="; ".join(f"{module}: {', '.join(layers)}" for module, layers in lora.targets.items()),
        full=", ".join(fully_tuned) or "nothing",
        imports="\n".join([*ours, *libraries, ""]),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
