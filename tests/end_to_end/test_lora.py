"""LoRA beside fully tuned connectors: what is exported is what was trained."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import train.auto  # noqa: F401
from tests.runs import build_here, write_records

pytestmark = pytest.mark.end_to_end


@pytest.mark.parametrize("modules", ["[llm]", "[llm,vision_encoder,audio_encoder]"])
def test_trained_merged_and_plain_peft_agree(modules: str, tmp_path: Path) -> None:
    run = build_here(
        [
            "+recipe=lora",
            f"lora.modules={modules}",
            "modules.tune_vision_encoder=true",
            "modules.tune_audio_encoder=true",
            *write_records(tmp_path),
            "data.eval=[]",
            "run.max_steps=3",
            f"run.dir={tmp_path / 'run'}",
        ]
    )
    run.trainer.fit()
    batch = next(iter(run.trainer.steps_from(0, 0))).batches[0]
    exported = run.export()
    trained = run.trainer.train_step.model.eval().get_base_model()
    base = AutoModelForCausalLM.from_pretrained(run.base)
    with torch.no_grad():
        before = base.eval().logits(batch)
        expected = trained.logits(batch)
        merged = AutoModelForCausalLM.from_pretrained(exported).eval().logits(batch)
        adapted = PeftModel.from_pretrained(base, exported / "adapter").eval().get_base_model().logits(batch)
    assert (before - expected).abs().max() > 0.1
    assert (merged - expected).abs().max() < 1e-4
    assert (adapted - expected).abs().max() < 1e-4
