"""What meets someone who trains for the first time, from the start of a run to its end and after."""

import json
import logging
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import train.auto  # noqa: F401
from tests.runs import SAMPLE, build_here, launch, succeed, write_records, write_small_model

pytestmark = pytest.mark.end_to_end

SHORT = ["run.max_steps=2", "data.max_tokens=256", "eval.generate=false"]


def test_the_folder_is_named_and_linked_and_a_finished_run_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_small_model(tmp_path)
    words = [*write_records(tmp_path), *SHORT, f"model.random_from={model}", "+recipe=lora"]
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "train")
    run = build_here(words)
    folder = run.folder.path
    assert f"the run's folder is '{folder}'" in caplog.text
    assert Path("outputs/lora/latest").readlink() == Path(folder.name)
    assert not run.was_finished
    run.trainer.fit()
    export = run.export()
    before = {path: path.stat().st_mtime_ns for path in export.rglob("*")}

    card = (export / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in card
    assert "import omnitune" in card
    assert f"base_model: {json.dumps(str(run.base))}" in card
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.base), export / "adapter")

    again = build_here([*words, "run.dir=outputs/lora/latest"])
    assert again.folder.path == folder
    assert again.was_finished
    assert again.trainer.fit()
    again.export()
    assert {path: path.stat().st_mtime_ns for path in export.rglob("*")} == before

    (export / "export.json").unlink()
    build_here([*words, f"run.dir={folder}"]).export()
    assert (export / "export.json").is_file()
    coded = build_here([*words, f"run.dir={folder}", "export.with_code=true"])
    assert (coded.export() / "modeling_megrezo.py").is_file()


def test_one_bad_record_does_not_end_a_small_set(tmp_path: Path) -> None:
    model = write_small_model(tmp_path)
    lines = (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [
        json.dumps({"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "yes"}]})
        for n in range(9)
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join([*texts, lines[0].replace(".png", ".lost")]))
    words = [f"data.train={file}", "data.eval=[]", f"model.random_from={model}", "+recipe=full", "tracker=none"]
    done = launch([*words, *SHORT, f"run.dir={tmp_path / 'run'}", "run.activation_checkpointing=full"])
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"1 of 10 records cannot be used: {file}:10: " in done.stderr
    assert "FutureWarning" not in done.stderr
    assert "deprecated" not in done.stderr
    finished = succeed([*words, *SHORT, f"run.dir={tmp_path / 'run'}", "run.activation_checkpointing=full"])
    assert "the run is finished, there is nothing left to train; its model is in" in finished.stderr
