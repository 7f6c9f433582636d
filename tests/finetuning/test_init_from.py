"""Start of a fine-tuning: the encoder of a fine-tuned model is used for another task, its head is not."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastbert.finetuning.saved import load_encoder
from tests.finetuning.conftest import FAST, make_glue, sentence, tiny_model, write_rows
from tests.flags import main


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def finetune(model: Path, task: list[str], out: Path, *more: str) -> int:
    return main(["finetune", "--model", str(model), *task, *FAST, "--out", str(out), *more])


def test_a_fine_tuned_model_gives_its_encoder_and_not_its_head(bert, words, pairs, tmp_path) -> None:
    assert finetune(bert, words, tmp_path / "first", "--epochs", "1") == 0
    first = tmp_path / "first" / "seed-0"
    found, own = load_encoder(first), load_file(first / "model" / "model.safetensors")
    assert torch.equal(found.weights["encoder.words.weight"], own["bert.embeddings.word_embeddings.weight"])
    assert not any("classifier" in name or "pooler" in name for name in found.weights)
    assert finetune(first, pairs, tmp_path / "second", "--epochs", "1", "--learning-rate", "1e-12") == 0
    second = load_file(tmp_path / "second" / "seed-0" / "model" / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.allclose(second[name], own[name], atol=1e-9)
    assert not torch.allclose(second["classifier.weight"], own["classifier.weight"], atol=1e-3)


def test_init_from_a_three_label_task_to_a_two_label_one(bert, tmp_path, capsys) -> None:
    """Such as SNLI before RTE: the encoder of the best seed of the largest fraction is used with a new head."""
    rng = random.Random(0)
    words = (("bad", "bad"), ("bad", "good"), ("good", "good"))
    rows = [
        {"text": sentence(rng, words[i % 3][0]), "pair": sentence(rng, words[i % 3][1]), "label": f"l{i % 3}"}
        for i in range(60)
    ]
    write_rows(tmp_path / "three.jsonl", rows)
    three = ["--task", "three", "--custom.pair", "pair", "--custom.train", str(tmp_path / "three.jsonl")]
    three += ["--custom.dev", str(tmp_path / "three.jsonl")]
    more = ("--epochs", "2", "--seeds", "2", "--train-fraction", "0.5,0.1")
    assert finetune(bert, three, tmp_path / "three", *more) == 0
    parts = {part["fraction"]: part["seeds"] for part in results(tmp_path / "three")["fractions"]}
    values = [seed["best"]["dev"]["dev"]["accuracy"] for seed in parts[0.5]]
    best = tmp_path / "three" / "fraction-0.5" / f"seed-{values.index(max(values))}"

    glue = make_glue(tmp_path / "glue", ["rte"])
    rte = ["finetune", "--task", "rte", "--glue-dir", str(glue), "--glue-subset", *FAST, "--learning-rate", "1e-12"]
    for name, start in (("out", tmp_path / "three"), ("seed", best)):
        assert main([*rte, "--init-from", str(start), "--out", str(tmp_path / name)]) == 0
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (best, tmp_path / "out" / "seed-0")]
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.allclose(weights[0][name], weights[1][name], atol=1e-9)
    before = load_encoder(bert).weights["encoder.blocks.0.feed_forward.down.weight"]
    assert not torch.allclose(weights[0][name], before, atol=1e-5)
    assert weights[0]["classifier.weight"].shape[0] == 3 and weights[1]["classifier.weight"].shape[0] == 2
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("out", "seed")]
    assert manifests[0]["science"] == manifests[1]["science"] and str(best) in manifests[0]["model"]
    assert results(tmp_path / "out")["model"] == str(tmp_path / "three")

    capsys.readouterr()
    for arguments, message in (
        (["--init-from", str(bert)], "holds no fine-tuned model"),
        (["--init-from", str(tmp_path / "nowhere")], "there is no folder"),
        (["--init-from", str(best), "--model", str(bert)], "give --model (a pretrained encoder) or --init-from"),
    ):
        assert main([*rte, *arguments, "--out", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_tokenizer_smaller_than_the_embedding_is_reported(bert, words, tmp_path, capsys) -> None:
    larger = tiny_model(tmp_path / "larger", vocab_size=40)
    for model, warned in ((bert, False), (larger, True)):
        assert finetune(model, words, tmp_path / str(warned), "--epochs", "1", "--no-save-model") == 0
        assert ("is it the one the model was trained with?" in capsys.readouterr().err) == warned
