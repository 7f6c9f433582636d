"""Scores of ELECTRA and multiple choice: by both networks, by the encoder alone, by the word predictions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForPreTraining

from fastbert.objectives import OBJECTIVES
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot import scoring
from fastbert.pretraining.zero_shot.scorer import Scorer, open_scorer
from fastbert.training.options import MachineOptions
from tests.flags import main

TEXTS = ["The people of the United States are free.", "the people of a state", "peace", "war"]
FP32 = ("--machine.precision", "fp32", "--machine.threads", "1")


@pytest.fixture(scope="module", params=["electra", "multiple-choice"])
def run(request, prepared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / request.param
    flags = ["--data", str(prepared), "--layers", "2", "--width", "32", "--heads", "2", "--length", "32"]
    flags += ["--batch-size", "8", "--steps", "4", "--eval-sequences", "8", "--initializer-std", "0.2"]
    flags += ["--position", "tupe-r", "--machine.threads", "1"]
    flags += ["--objective", request.param, f"--{request.param}.mask-rate", "0.2"]
    if request.param == "multiple-choice":
        flags += ["--multiple-choice.unmasked-fraction", "0.5"]
    assert main(["pretrain", *flags, "--out", str(out)]) == 0
    return out


def opened(model: Path) -> tuple[Scorer, list[scoring.Sentence]]:
    options = EvaluateOptions(model=str(model), pairs="-", machine=MachineOptions(threads=1, precision="fp32"))
    scorer = open_scorer(options)
    return scorer, [scoring.sentence(encoding) for encoding in scoring.encoded(scorer, TEXTS)]


@pytest.mark.parametrize("unmasked", [1.0, 0.3])
def test_the_score_of_both_networks_inverts_their_training(unmasked: float) -> None:
    """The joint distribution of original, replacement and mask, enumerated: an optimal discriminator's odds, also if it
    is trained with a fraction of the tokens without a mask and its odds are divided by that fraction."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    rate = 0.2
    original = np.zeros(6)
    replaced = np.zeros(6)
    for word in range(6):
        original[word] += unmasked * (1 - rate) * p[word]  # not masked
        for sample in range(6):  # masked; the generator does not see the word
            (original if sample == word else replaced)[sample] += rate * p[word] * q[sample]
    scorer = Scorer(*[None] * 8, mask_rate=rate, unmasked_fraction=unmasked)
    found = scorer.combined(np.log(q), np.log(original / replaced / unmasked))
    assert found == pytest.approx(np.log(p), abs=1e-12)
    # With odds of 1000 and q near 1 nothing overflows.
    assert scorer.combined(np.array([-1e-9, -800.0]), np.array([900.0, -900.0])) == pytest.approx(
        [0.0, -1701.386], abs=0.1
    )


@torch.no_grad()
def log_samples(scorer: Scorer, one: scoring.Sentence) -> np.ndarray:
    """Log-probability of each word among the samples that fill its mask."""
    objective, ids = scorer.log_odds.__self__, torch.from_numpy(one.ids.astype(np.int64))
    shown = ids.expand(len(one.positions), -1).scatter(1, torch.from_numpy(one.positions)[:, None], scorer.mask_id)
    rows = zip(one.positions, shown, strict=True)
    logits = torch.stack([objective.word_logits(objective.small(row[None])[0, index]) for index, row in rows])
    q = logits.double().softmax(-1)
    return q.gather(1, ids[one.positions][:, None])[:, 0].log().numpy()


def test_names_and_values(run, capsys, tmp_path) -> None:
    names = {"electra": ("electra", "discriminator", "generator")}
    expected = names.get(run.name, ("multiple-choice", "choice", "meta controller"))
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps({"sentence_good": a, "sentence_bad": b}) + "\n" for a, b in (TEXTS[:2], TEXTS[2:]))
    )
    out = tmp_path / "scores.jsonl"
    capsys.readouterr()
    assert main(["evaluate", "--model", str(run), "--pairs", str(file), "--out", str(out), "--json", *FP32]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["score"], *result["other_scores"]) == expected
    scorer, sentences = opened(run)
    assert (scorer.names, scorer.mask_rate) == (expected, 0.2)
    assert scorer.unmasked_fraction == (1.0 if run.name == "electra" else 0.5)
    words = scoring.log_probabilities(scorer, sentences, "salazar")
    odds = scoring.log_odds(scorer, sentences)
    both = [scorer.combined(log_samples(scorer, a), b).sum() for a, b in zip(sentences, odds, strict=True)]
    rows = [json.loads(line)["scores"] for line in out.read_text().splitlines()]
    found = [[row[name][key] for row in rows for key in ("good", "bad")] for name in expected]
    assert found[0] == pytest.approx(both, rel=1e-5)
    assert found[1] == pytest.approx([value.sum() for value in odds], rel=1e-5)
    assert found[2] == pytest.approx([value.sum() for value in words], rel=1e-5)
    assert main(["evaluate", "--model", str(run), "--pairs", str(file), *FP32]) == 0
    printed = capsys.readouterr().out
    assert f"accuracy by {expected[0]}:" in printed
    assert f"by parts of the model: {expected[1]} " in printed


def test_log_odds_do_not_depend_on_the_batch(run) -> None:
    scorer, sentences = opened(run)
    whole, single = scoring.log_odds(scorer, sentences), scoring.log_odds(scorer, sentences, 1)
    assert np.concatenate(whole) == pytest.approx(np.concatenate(single), abs=1e-4)
    assert abs(whole[2] - whole[3]).max() > 1e-3


def test_precision_of_log_odds(run) -> None:
    scorer, sentences = opened(run)
    exact = np.concatenate(scoring.log_odds(scorer, sentences))
    rounded = np.concatenate(scoring.log_odds(replace(scorer, precision="bf16"), sentences))
    assert (exact != rounded).any()
    assert np.corrcoef(exact, rounded)[0, 1] > 0.98


def test_the_text_is_scored_by_the_network_that_predicts_words(run, capsys, tmp_path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[0])
    capsys.readouterr()
    assert main(["evaluate", "--model", str(run), "--pll", str(tmp_path / "text.txt"), "--json", *FP32]) == 0
    result = json.loads(capsys.readouterr().out)
    scorer, sentences = opened(run)
    (words,) = scoring.log_probabilities(scorer, sentences[:1], "salazar")
    assert result["score"] == scorer.names[2]
    assert result["nats_per_token"] == pytest.approx(-words.mean(), rel=1e-5)


def test_log_odds_are_those_of_the_objective(run) -> None:
    """From the losses of the objective, which reads the sentence with one of its words as the replaced one."""
    scorer, sentences = opened(run)
    objective = scorer.log_odds.__self__
    assert isinstance(objective, OBJECTIVES[run.name])
    ids = torch.from_numpy(sentences[0].ids.astype(np.int64))[None]
    inputs = objective.plain_inputs(ids)
    with torch.no_grad():
        # All tokens are original, so the mean loss is that of the right answers: -log P(original).
        loss, *_ = objective.main_loss(inputs, ids, objective.generator_hidden(inputs))
        odds = objective.original_log_odds(ids)
    assert torch.nn.functional.softplus(-odds).sum().item() == pytest.approx(loss.item(), rel=1e-5)


def test_exports(run, capsys, tmp_path) -> None:
    """An ELECTRA's export scores pairs with its discriminator; one of multiple choice cannot."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"sentence_good": TEXTS[0], "sentence_bad": TEXTS[1]}) + "\n")
    arguments = ["evaluate", "--model", str(run / "model"), "--pairs", str(file), *FP32]
    capsys.readouterr()
    if run.name != "electra":
        assert main(arguments) == 2
        assert "has no MLM head" in capsys.readouterr().err
        return
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["score"], result["other_scores"]) == ("discriminator", {})
    of_run, sentences = opened(run)
    of_export, _ = opened(run / "model")
    found = scoring.log_odds(of_export, sentences)
    assert np.concatenate(found) == pytest.approx(np.concatenate(scoring.log_odds(of_run, sentences)), abs=1e-5)
    model = AutoModelForPreTraining.from_pretrained(run / "model", trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(sentences[0].ids.astype(np.int64))[None]).logits[0]
    assert found[0] == pytest.approx(-logits[1:-1].numpy(), abs=1e-4)
    (tmp_path / "text.txt").write_text(TEXTS[0])
    assert main(["evaluate", "--model", str(run / "model"), "--pll", str(tmp_path / "text.txt")]) == 2
    assert "is a discriminator without a generator" in capsys.readouterr().err
