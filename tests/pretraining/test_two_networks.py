"""ELECTRA and multiple choice in the pretraining loop: killed and resumed, in low precision, continued, refused."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import ElectraForPreTraining

from tests.finetuning.conftest import FAST, make_task
from tests.flags import main
from tests.pretraining.test_resume import assert_same_run, metrics, run_and_die

OBJECTIVES = ("electra", "multiple-choice")
FURTHER = {
    "electra": [],
    "multiple-choice": [
        *("--multiple-choice.unmasked-fraction", "0.5"),
        *("--multiple-choice.shared-bias", "--multiple-choice.nota-embedding", "--multiple-choice.with-replacement"),
    ],
}
"""Options that are off by default."""


@pytest.fixture
def short(flags) -> list[str]:
    return [*flags, "--steps", "8", "--eval-every", "4", "--checkpoint-every", "3", "--log-every", "2"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_killed_and_resumed_to_the_bit(objective: str, short, tmp_path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    chosen = [*short, "--objective", objective, "--document-mask", *FURTHER[objective]]
    assert main(["pretrain", *chosen, "--out", str(whole)]) == 0
    run_and_die("step", 5, ["pretrain", *chosen, "--out", str(broken)])
    assert main(["pretrain", "--resume", str(broken), *chosen]) == 0  # sizes that are not given are those of the run
    assert_same_run(whole, broken)
    stored = yaml.safe_load((broken / "config.yaml").read_text())
    assert stored["electra"]["generator_scale"] == (0.25 if objective == "electra" else None)
    controller = [stored["multiple_choice"][f"controller_{name}"] for name in ("layers", "width")]
    assert controller == ([2, 8] if objective == "multiple-choice" else [None, None])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_notes_and_low_precision(objective: str, short, tmp_path) -> None:
    """Notes are written by the main network and resumed; samples and scores work under autocast."""
    run = tmp_path / "run"
    notes = ["--notes.enabled", "--notes.half-window", "4", "--notes.fraction", "1", "--machine.precision", "bf16"]
    assert main(["pretrain", *short, "--objective", objective, *notes, "--out", str(run)]) == 0
    rows, last = metrics(run), run / "checkpoints" / "step-00000008" / "model.safetensors"
    train = [row for row in rows if row["split"] == "train"]
    assert 0 < train[0]["notes_words"] < train[-1]["notes_words"] and train[-1]["notes_drift"] > 0
    table = load_file(last)["notes.table"]
    last.unlink()
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert metrics(run) == rows and torch.equal(load_file(last)["notes.table"], table)
    assert not any("notes" in name for name in load_file(run / "model" / "model.safetensors"))


@pytest.mark.parametrize("more", [[], ["--notes.enabled", "--notes.fraction", "1"]])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_divergence_is_reported(objective: str, more: list[str], short, tmp_path, capsys) -> None:
    """Samples from NaN are arbitrary words, the loss is NaN, and the run stops like one of MLM."""
    huge = ["--optimizer.learning-rate", "1e9", "--schedule.warmup", "0", *more]
    assert main(["pretrain", *short, "--objective", objective, *huge, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("update skipped") == 5 and "not finite in 5 steps in a row, up to step" in printed


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fine_tunes_and_is_used_by_init_from(objective: str, short, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", *short, "--objective", objective, "--position", "absolute", "--out", str(run)]) == 0
    task = make_task(tmp_path, "words", train=32, dev=16)
    for model in (run, run / "model"):
        out = tmp_path / f"tuned-{model.name}"
        assert main(["finetune", "--model", str(model), *task, *FAST, "--epochs", "1", "--out", str(out)]) == 0
    if objective == "electra":
        assert ElectraForPreTraining.from_pretrained(run / "model").config.embedding_size == 32
    capsys.readouterr()
    # Its encoder, but not its head, goes into a run with another objective; all weights go into one with the same, and
    # those of an export into its encoder.
    index = short.index("--layers")
    shapeless = [*short[:index], *short[index + 6 :]]
    shapeless = [word for i, word in enumerate(shapeless) if word != "--position" and shapeless[i - 1] != "--position"]
    cases = (("mlm", run, "head.dense.weight"), (objective, run / "model", "small.blocks.0"), (objective, run, ""))
    for number, (other, start, new) in enumerate(cases):
        on = ["--objective", other, "--init-from", str(start), "--out", str(tmp_path / f"{number}"), "--steps", "2"]
        assert main(["pretrain", *shapeless, *on]) == 0
        printed = next((line for line in capsys.readouterr().err.splitlines() if "newly initialized" in line), "")
        assert new in printed and "words.weight" not in printed and "encoder." not in printed.replace("small.", "")
        assert bool(printed) == bool(new)


def test_refused_before_anything_is_written(flags, tmp_path, capsys) -> None:
    run = ["pretrain", *flags, "--objective", "multiple-choice", "--out", str(tmp_path / "run")]
    assert main([*run, "--multiple-choice.choices", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err
    assert main([*run, "--multiple-choice.choices", "601"]) == 2
    assert "more than the 595 words" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()
    more = ["--steps", "1", "--multiple-choice.controller-width", "64"]
    assert main([*run, *more]) == 0
    assert "wider than the encoder" in capsys.readouterr().err


def test_options_of_another_objective_do_not_change_the_experiment(flags, tmp_path) -> None:
    names = []
    for number, more in enumerate(([], ["--electra.loss-weight", "7"], ["--mlm.mask-rate", "0.3"])):
        run = tmp_path / str(number)
        assert main(["pretrain", *flags, "--steps", "1", *more, "--out", str(run)]) == 0
        names.append(json.loads((run / "manifest.json").read_text())["experiment"])
    assert names[0] == names[1] != names[2]
