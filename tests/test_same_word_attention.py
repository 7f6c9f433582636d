"""The script that says how much heads look at the same word, against transformers' attention probabilities."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "same_word_attention.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    bert = BertForMaskedLM(config).eval()
    bert.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder, bert


def run(folder: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *more, str(folder)], capture_output=True, text=True, timeout=120, cwd=folder
    )


def test_it_is_the_attention_of_transformers(model) -> None:
    folder, bert = model
    (folder / "dev.jsonl").write_text(
        '{"one": "a b c", "two": "b d a", "label": "x"}\n{"one": "a", "two": "b", "label": "y"}\n'
    )
    (folder / "task.yaml").write_text(
        "name: pairs\ntrain: dev.jsonl\ndev: dev.jsonl\ntext: one\npair: two\nlabel: label\nlabels: x,y\n"
    )
    done = run(folder, "task.yaml")
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[2, 5, 6, 7, 3, 6, 8, 5, 3]])
    types = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        layers = bert.bert(ids, token_type_ids=types, output_attentions=True).attentions
    expected = [[9 * (head[5, 2] + head[7, 1]) / 2 for head in layer[0]] for layer in layers]
    lines = done.stdout.splitlines()
    for line, heads in zip(lines[1:], expected, strict=True):
        assert line.partition(": ")[2].split() == [f"{value:.1f}" for value in heads]
    assert len({f"{value:.1f}" for layer in expected for value in layer}) > 1


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("nothing.yaml", "", "nothing.yaml"),
        ("single.yaml", "", "single.yaml has single sentences"),
        ("apart.yaml", "pair: two\n", "no pair that fits into the model's positions has a word in common"),
    ],
)
def test_mistakes(model, task, row, said) -> None:
    folder = model[0]
    (folder / "apart.jsonl").write_text(
        '{"one": "a", "two": "b", "label": "x"}\n{"one": "c", "two": "b", "label": "y"}\n'
    )
    if task != "nothing.yaml":
        head = f"name: apart\ntrain: apart.jsonl\ndev: apart.jsonl\ntext: one\n{row}label: label\nlabels: x,y\n"
        (folder / task).write_text(head)
    done = run(folder, task)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
