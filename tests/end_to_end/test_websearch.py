"""A model that learned one web search answers it from a folder of texts, with a citation."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from tests.runs import ROOT, build_here, losses
from train.commands.main import main
from train.data.functions import WEB_SEARCH, Call, observation_text, system_text
from train.inference.search import LocalSearch

pytestmark = pytest.mark.end_to_end

TEXTS = ROOT / "data/websearch/texts"
QUESTION = "What is Corvin museum made of?"
QUERY = "Corvin museum material"


def conversation(hour: int, answer: str) -> dict:
    """The search, at an hour of its own: what it learns must hold now too."""
    results = LocalSearch(TEXTS)(QUERY)
    turns = [
        ("system", system_text([WEB_SEARCH], datetime(2026, 1 + hour % 12, 1 + hour, hour, hour))),
        ("user", QUESTION),
        ("assistant", Call("web_search", {"query": QUERY}).text),
        ("observation", observation_text(results)),
        ("assistant", answer),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_the_chat_loop_answers_from_the_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    title, text = (TEXTS / "corvin-museum.txt").read_text().splitlines()
    answer = f"{text.split('.')[0]} [citation:1]."
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(json.dumps(conversation(hour, answer)) for hour in range(24)))
    run = build_here(
        [
            *("model=tiny_instruct", f"data.train=[{{path: {records}}}]", "data.eval=[]", "data.max_tokens=1024"),
            *("run.max_steps=40", "run.epochs=20", "checkpoint.save_every=0", "optim.schedule=constant"),
            *("optim.warmup_ratio=0", f"run.dir={tmp_path / 'run'}"),
        ]
    )
    run.trainer.fit()
    assert losses(run.folder.path)[-1] < 0.1
    main(["chat", str(run.export()), QUESTION, "--search", str(TEXTS), "--max-new-tokens", "40"])
    said = capsys.readouterr()
    assert said.out == f"{answer}\n"
    assert f"searching for: {QUERY}\n  [1] {title}\n" in said.err
