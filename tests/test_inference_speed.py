"""scripts/against_transformers/inference_speed.py: both sides find the same, and every contestant is timed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from fastbert.cli import main
from fastbert.errors import UserError

SCRIPTS = Path(__file__).parents[1] / "scripts" / "against_transformers"
WORDS = ["the", "people", "of", "this", "state", "have", "a", "right", "to", "rest"]


@pytest.fixture(scope="module")
def script():
    """The module of the script."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("inference_speed")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def files(prepared, tmp_path_factory) -> Path:
    """Pretrained and fine-tuned BERTs with weights large enough that their outputs differ, pairs and texts."""
    folder = tmp_path_factory.mktemp("speed")
    shape = ["--position=absolute", "--norm=post", "--layers=2", "--width=32", "--heads=2", "--length=32"]
    common = ["--batch-size=4", "--steps=2", "--initializer-std=0.2", "--machine.threads=1"]
    assert main(["pretrain", f"--data={prepared}", f"--out={folder / 'run'}", *shape, *common]) == 0
    texts = [" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) for i in range(20)]
    lines = [json.dumps({"text": text, "label": "ab"[len(text) % 2]}) for text in texts]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    good, bad = texts, [" ".join(reversed(text.split())) for text in texts]
    pairs = [json.dumps({"sentence_good": a, "sentence_bad": b}) for a, b in zip(good, bad, strict=True)]
    (folder / "pairs").mkdir()
    (folder / "pairs" / "pairs.jsonl").write_text("\n".join(pairs))
    words = ["finetune", f"--model={folder / 'run'}", "--task=mine", f"--custom.train={folder / 'texts.jsonl'}"]
    words += [f"--custom.dev={folder / 'texts.jsonl'}", "--epochs=1", "--seeds=1", f"--out={folder / 'tuned'}"]
    assert main([*words, "--machine.threads=1"]) == 0
    return folder


def arguments(script, files: Path):
    values = {"pretrained": str(files / "run" / "model"), "classifier": str(files / "tuned" / "seed-0" / "model")}
    values |= {"pairs": files / "pairs", "texts": files / "texts.jsonl", "threads": 1}
    return type("Arguments", (), values)


@pytest.mark.parametrize(
    ("work", "contestant"),
    [("pairs", "transformers by length"), ("texts", "transformers"), ("texts", "transformers by length")],
)
def test_both_sides_find_the_same(script, files, work, contestant, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "TOKENS", 64)
    given = arguments(script, files)
    ours, theirs = (script.pass_of(work, one, given)() for one in ("fastbert", contestant))
    assert script.difference(theirs, ours) <= (0.1 if work == "pairs" else script.CLOSE)
    if work == "texts":
        assert len(ours) == 20 and max(row[0] for row in ours) - min(row[0] for row in ours) > 0.01


def test_the_score_of_a_sentence_is_that_of_its_words(script, files, tmp_path, monkeypatch) -> None:
    """With logits that grow with the word's id alone, the sentence whose last word has the higher id is the better."""
    tokenizer = script.Theirs(str(files / "run" / "model"), "AutoModelForMaskedLM", False).tokenizer
    logits = 0.1 * torch.arange(len(tokenizer))
    monkeypatch.setattr(script.Theirs, "logits", lambda self, rows: logits.expand(len(rows), len(rows[0]), -1))
    low, high = sorted(("the", "of"), key=tokenizer.convert_tokens_to_ids)
    better, worse = (f"of this {word}" for word in (high, low))
    assert len(tokenizer(better)["input_ids"]) == len(tokenizer(worse)["input_ids"])
    for good, bad, expected in ((better, worse, 1.0), (worse, better, 0.0), (better, better, 0.5)):
        (tmp_path / "pairs.jsonl").write_text(json.dumps({"sentence_good": good, "sentence_bad": bad}))
        model = str(files / "run" / "model")
        assert script.pairs_by_transformers(model, tmp_path / "pairs.jsonl", False)() == expected


def test_batches_have_every_row_once_and_at_most_the_tokens(script) -> None:
    lengths = torch.randint(1, 40, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    for by_length in (True, False):
        found = script.batches(lengths, by_length)
        assert sorted(int(i) for rows in found for i in rows) == list(range(100))
    by_length = script.batches([9000, 4096, 4096, 100], True)
    assert [rows.tolist() for rows in by_length] == [[0], [2, 1], [3]]


def test_another_result_is_an_error(script, files, tmp_path, monkeypatch, capsys) -> None:
    def run(command, **more):
        out = Path(command[command.index("--one") - 1])
        found = 0.5 if command[-1] == "fastbert" else 0.8
        out.write_text(json.dumps({"seconds": [2.0, 1.0], "found": found, "count": 20}))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(script.subprocess, "run", run)
    words = ["x", f"--pretrained={files / 'run'}", f"--pairs={files / 'pairs'}", f"--out={tmp_path / 'speed.json'}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        script.main()
    assert "pairs: transformers by length finds something else than fastbert: 0.300" in capsys.readouterr().err
    assert not (tmp_path / "speed.json").exists()


def test_table(script) -> None:
    times = {"fastbert": (2.0, 4.0), "transformers by length": (5.0, 8.0)}
    rows = [
        {"work": "pairs", "contestant": one, "seconds": seconds, "first": 9.0, "count": 1340}
        for one, both in times.items()
        for seconds in both
    ]
    text = script.table(rows)
    assert "| pairs | fastbert | 1,340 | 3.00 (2.00 to 4.00) | 9.00 | 1.00 |" in text
    assert "| pairs | transformers by length | 1,340 | 6.50 (5.00 to 8.00) | 9.00 | 2.25 |" in text


def test_only_bert_is_compared(script, tmp_path, prepared) -> None:
    from transformers import DistilBertConfig, DistilBertForMaskedLM, PreTrainedTokenizerFast

    shape = {"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8}
    DistilBertForMaskedLM(DistilBertConfig(**shape)).save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(prepared / "tokenizer" / "tokenizer.json"))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is of type distilbert, not bert"):
        script.pairs_by_transformers(str(tmp_path), tmp_path, False)
