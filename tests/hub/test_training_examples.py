"""Training examples of docs/encoders.md on toy data: transformers' Trainer and sentence-transformers."""

import json
import re
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForTokenClassification, Trainer, TrainingArguments

from fastbert.hub.export import export_model
from tests.hub.conftest import named, random_models, small_config

PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"
QUICK = {"num_train_epochs=3": "num_train_epochs=40", "num_train_epochs=1,": "num_train_epochs=20,"}
QUICK |= {"learning_rate=5e-5": "learning_rate=5e-3", "logging_steps=10": "logging_steps=1, save_strategy='no'"}
QUICK |= {"per_device_train_batch_size=64": "per_device_train_batch_size=8"}
"""What a toy task has in place of the page's settings."""
TAGS = {"a": "B-person", "b": "I-person", "the": "O", "state": "O", "cab": "O"}


@pytest.fixture
def folder(tokenizer, tmp_path, monkeypatch) -> Path:
    """The current folder, with a TUPE-R export `my-bert`."""
    monkeypatch.chdir(tmp_path)
    config = small_config(position="tupe-r", dropout=0.0, attention_dropout=0.0)
    export_model(config, named(*random_models(config)), tokenizer, tmp_path / "my-bert")
    return tmp_path


def run_example(title: str) -> dict:
    """The names that the code under a title of the page defines."""
    found = re.search(rf"## {title}\n.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"docs/encoders.md has no code under {title}"
    code = found[1]
    for line, quick in QUICK.items():
        code = code.replace(line, quick)
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_entities_with_the_trainer(folder) -> None:
    sentences = [["the", "a", "b", "cab"], ["a", "state", "cab", "the"], ["state", "a", "b", "the"], list("abab")]
    rows = [{"tokens": words, "tags": [TAGS[word] for word in words]} for words in 8 * sentences]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = run_example("Named entities with transformers' Trainer")
    model, trainer, data = names["model"], names["trainer"], names["trainer"].train_dataset
    assert type(model).__name__ == "FastBertForTokenClassification"
    assert data[0]["labels"] == [-100, 2, 0, 1, 2, -100, -100, -100]  # [CLS] the a b c ##a ##b [SEP]
    assert losses(trainer)[-1] < 0.1 * losses(trainer)[0]

    again = AutoModelForTokenClassification.from_pretrained("my-ner", trust_remote_code=True)
    assert again.config.id2label == {0: "B-person", 1: "I-person", 2: "O"}
    inputs = names["tokenizer"](["the", "b"], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)

    found = []
    for size, steps in ((8, 1), (4, 2)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none"}
        fresh = AutoModelForTokenClassification.from_pretrained("my-ner", trust_remote_code=True)
        torch.manual_seed(0)
        fresh.classifier.reset_parameters()  # away from a loss of nearly 0
        arguments = TrainingArguments(f"accumulated-{steps}", **settings)
        accumulated = Trainer(fresh, arguments, train_dataset=data, data_collator=trainer.data_collator)
        accumulated.train()
        found.append([accumulated.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_embeddings_with_sentence_transformers(folder) -> None:
    pairs = [{"anchor": f"the {letter}", "positive": f"{letter} state"} for letter in "abcdefgh"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    names = run_example("Sentence embeddings with sentence-transformers")
    fell = losses(names["trainer"])
    assert fell[-1] < 0.5 * fell[0]
    assert names["embeddings"].shape == (2, 24)
    texts = [pair["anchor"] for pair in pairs] + ["a longer text: the state, the state"]
    again = SentenceTransformer("my-embeddings", trust_remote_code=True)
    assert type(again[0].auto_model).__name__ == "FastBertModel"
    assert (again.encode(texts) == names["model"].encode(texts)).all()
