"""A recording of 95 s in windows: the same tokens and answers in training, resuming, evaluation, export and chat."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.end_to_end.test_resume import go_back
from tests.runs import build_here, metrics, write_small_model
from train.commands.main import main
from train.inference.chat import Chat

pytestmark = pytest.mark.end_to_end

QUESTION = "Convert speech to text."


def test_a_long_recording_from_training_to_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    clip = rng.uniform(-0.4, 0.4, 95 * 16_000) * np.repeat(rng.uniform(0, 1, 950), 1600)
    soundfile.write(tmp_path / "long.flac", clip, 16_000)
    turns = [
        {"role": "user", "content": {"text": QUESTION, "audio": "long.flac"}},
        {"role": "assistant", "content": "lemon river"},
    ]
    (tmp_path / "records.jsonl").write_text(json.dumps({"conversations": turns}))
    words = [
        *(f"data.train=[{tmp_path / 'records.jsonl'}]", f"data.eval=[{tmp_path / 'records.jsonl'}]"),
        *(f"model.random_from={write_small_model(tmp_path)}", f"run.dir={tmp_path / 'run'}", "run.epochs=4"),
        *(
            "data.long_audio=split",
            "data.max_tokens=4096",
            "eval.max_new_tokens=6",
            "checkpoint.save_every=2",
            "checkpoint.keep_last=0",
        ),
        *("eval.before_training=false", "run.packs_per_step=1", "run.threads=1"),
    ]
    run = build_here(words)
    run.trainer.fit()
    straight = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(straight) == 4
    go_back(tmp_path / "run", 2)
    again = build_here(words)
    again.trainer.fit()
    assert [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line] == straight

    export = again.export()
    lines = sorted((tmp_path / "run" / "predictions").iterdir())[-1].read_text().splitlines()
    [evaluated] = [json.loads(line)["answer"] for line in lines]
    long = ["--audio", str(tmp_path / "long.flac")]
    main(["chat", str(export), QUESTION, *long, "--long-audio", "split", "--max-new-tokens", "6"])
    assert capsys.readouterr().out.strip() == evaluated.strip()
    with pytest.raises(SystemExit, match=r"of 95\.0 s is longer than 30 s"):
        main(["chat", str(export), QUESTION, *long])

    record = again.records.record(0)
    chat = Chat.load(export, long_audio="split", device="cpu")
    asked = chat.model.processor.prompts(
        [[turns[0] | {"content": {"text": QUESTION, "audio": long[1]}}]], max_tokens=4096
    )
    prompt, learned = again.records.processor.prompt(record), again.records.encode(record)
    assert torch.equal(asked.input_ids, prompt.input_ids)
    assert torch.equal(learned.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    for sample in (prompt, learned):
        assert torch.equal(sample.media["audio"].values, asked.media["audio"].values)
        assert len(sample.media["audio"].sizes) == 4
