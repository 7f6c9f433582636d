"""Reading of an ablation's YAML file, and what is refused before anything is opened."""

from pathlib import Path

import pytest
import yaml

from fastbert.cli import main
from fastbert.errors import UserError
from fastbert.studies.ablate.options import load_ablation
from tests.studies.conftest import write_pairs

BASE = {"layers": 2, "width": 32, "position": "absolute", "length": 32, "batch_size": 8}
FILE = {
    "base": BASE,
    "variants": {"absolute": None, "tupe-r": {"position": "tupe-r"}, "electra": {"objective": "electra"}},
    "budget": {"equal": "flops", "steps": 40},
}


def write(folder: Path, **changes) -> Path:
    path = folder / "x.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in (FILE | changes).items() if value != "absent"}, sort_keys=False)
    )
    return path


def error(folder: Path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        load_ablation(write(folder, **changes))
    assert str(folder / "x.yaml") in str(caught.value)
    return str(caught.value)


def test_variants_are_changes_of_the_base(tmp_path) -> None:
    ablation, options = load_ablation(write(tmp_path, baseline="tupe-r", seeds=[3, 5], threads=2, workers=4))
    assert [variant.name for variant in ablation.variants] == ["tupe-r", "absolute", "electra"]
    first, second, third = (variant.options for variant in ablation.variants)
    assert (first.encoder.position, second.encoder.position, third.objective) == ("tupe-r", "absolute", "electra")
    assert all(o.encoder.width == 32 and o.batch_size == 8 and o.machine.threads == 2 for o in (first, second, third))
    assert ablation.seeds == (3, 5) and ablation.anneal is None and ablation.points[-1] == 1.0
    assert (ablation.budget.equal, ablation.budget.steps) == ("flops", 40) and options.workers == 4


def test_a_group_is_changed_option_by_option(tmp_path) -> None:
    base = BASE | {"optimizer": {"learning-rate": 1e-3, "beta2": 0.9}}
    path = write(tmp_path, base=base, variants={"a": None, "b": {"optimizer": {"learning_rate": 2e-3}}})
    other = load_ablation(path)[0].variants[1].options.optimizer
    assert (other.learning_rate, other.beta2) == (2e-3, 0.9)


def test_the_base_from_a_file(tmp_path) -> None:
    """In the folder of the YAML file; what the file itself has wins, and null takes a budget back."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE | {"steps": 900, "width": 64}))
    own = {"inherits": "run.yaml", "width": 16, "heads": 2}
    ablation, _ = load_ablation(write(tmp_path, base=own, budget="absent"))
    options = ablation.variants[0].options
    assert (options.encoder.width, options.encoder.layers, options.out, options.seed) == (16, 2, None, 0)
    assert (ablation.budget.equal, ablation.budget.steps, options.steps) == ("steps", 900, None)
    again = load_ablation(write(tmp_path, base=own | {"steps": None, "tokens": 5000}, budget={"equal": "flops"}))[
        0
    ].budget
    assert (again.equal, again.steps, again.tokens) == ("flops", None, 5000)
    assert load_ablation(write(tmp_path, base={"inherits": "run.yaml"}))[0].budget.steps == 40
    for base in ("run.yaml", {"file": "run.yaml"}):
        with pytest.raises(UserError, match=r"file is called inherits now; write base: \{inherits: 'run\.yaml'\}"):
            load_ablation(write(tmp_path, base=base))
    (tmp_path / "run.yaml").write_text("seed: 3")
    with pytest.raises(UserError, match=r"inherits .*run\.yaml: base: seed cannot be given here; give seeds"):
        load_ablation(write(tmp_path, base={"inherits": "run.yaml"}))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("data", "other.txt", "same data"),
        ("vocab_size", 900, "same data"),
        ("tokenizer", "elsewhere", "same data"),
        ("validation-fraction", 0.3, "same data"),
        ("length", 64, "same batches in the same order"),
        ("batch_size", 16, "same batches in the same order"),
        ("seed", 1, "give seeds next to variants"),
        ("eval_sequences", 9, "same validation set"),
        ("steps", 9, "give it under budget"),
        ("machine", {"precision": "bf16"}, "times are compared"),
        ("out", "runs/y", "give --out"),
        ("milestones", "3,4", "give checkpoints"),
        ("launch", "ray", "is one process"),
        ("checkpoint_words", "1M", "give checkpoints"),
    ],
)
def test_variants_may_not_change_what_is_held_equal(tmp_path, key, value, reason) -> None:
    text = error(tmp_path, variants={"absolute": None, "odd": {key: value}})
    assert f"variants: odd: {key.replace('-', '_')} cannot be given here" in text and reason in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"varants": {}}, "did you mean 'variants'"),
        ({"objective": "mlm"}, "put it under base"),
        ({"steps": 5}, "give it under budget"),
        ({"base": BASE | {"widht": 3}}, "did you mean 'width'"),
        ({"base": BASE | {"seed": 3}}, "give seeds next to variants"),
        ({"base": BASE | {"machine": {"threads": 2}}}, "give threads next to base"),
        ({"base": [1]}, "expected a mapping"),
        ({"variants": {}}, "must be a mapping"),
        ({"variants": ["a", "b"]}, "must be a mapping"),
        ({"variants": {"a": None, "b": {"postion": "tupe-r"}}}, "variants: b: unknown option 'postion'; did you mean"),
        ({"variants": {"a": None, "b": {"position": "tupe-x"}}}, "variants: b: unknown position encoding 'tupe-x'"),
        ({"variants": {"a": None, "b": {}}}, "b and a have the same options"),
        ({"variants": {"a": None, 3: {"norm": "pre"}}}, "put it in quotes"),
        ({"baseline": "absolut"}, "did you mean 'absolute'"),
        ({"baseline": {"data": "sotu"}}, "baseline must be the name of a variant, found {'data': 'sotu'}"),
        ({"baseline": ["absolute"]}, "baseline must be the name"),
        ({"baseline": None}, "found nothing"),
        ({"budget": {"equal": "joules", "steps": 3}}, "unknown budget unit 'joules'"),
        ({"budget": {"equal": "steps", "step": 3}}, "unknown option 'step'; did you mean 'steps'"),
        ({"budget": {"steps": 3, "minutes": 4}}, "once, not as steps and as minutes"),
        ({"budget": {"minutes": -1}}, "greater than 0"),
        ({"budget": {"equal": "steps"}}, "give the size of the baseline's budget"),
        ({"checkpoints": [10, 50, 100]}, "fractions of the budget in (0, 1]"),
        ({"checkpoints": [0.5, 0.2, 1.0]}, "must ascend"),
        ({"checkpoints": [0.5]}, "end with 1.0"),
        ({"checkpoints": [1.0], "anneal": {}}, "not both"),
        ({"anneal": {"fraction": 0}}, "fraction must be a number in (0, 1]"),
        ({"anneal": {"fractions": 0.1}}, "did you mean 'fraction'"),
        ({"anneal": {}, "variants": {"a": None, "b": {"schedule": {"name": "cosine"}}}}, "has no effect with anneal"),
        ({"seeds": 0}, "at least 1"),
        ({"threads": 0}, "whole number from 1"),
        ({"workers": 0}, "at least 1"),
        ({"learning_rates": [1e-4]}, "there are no tasks"),
        ({"trials": 3}, "there are no tasks"),
        ({"tasks_at": [1.0]}, "there are no tasks"),
        ({"tasks": ["cola"], "tasks_at": [0.3, 1.0]}, "0.3 is not one of the points, 0.1, 0.2"),
        ({"tasks": ["cola"], "tasks_at": [0.2]}, "end with 1.0"),
        ({"tasks": [{"task": "cola", "epoch": 3}]}, "unknown option 'epoch'"),
        ({"evaluate": {}}, "give pairs (a folder of minimal pairs), pll (a text) or both"),
        ({"evaluate": ["blimp"]}, "evaluate: expected a mapping with pairs, pll or both"),
        ({"evaluate": {"pares": "blimp"}}, "evaluate: unknown option 'pares'; did you mean 'pairs'"),
        ({"evaluate": {"pairs": "blimp", "sentences": 5}}, "sentences has no effect without pll"),
        ({"evaluate": {"pll": "x.txt", "sentences": 0}}, "sentences must be at least 1"),
        ({"evaluate": {"pll": "x.txt", "pll_form": "word"}}, "did you mean 'word-l2r'"),
        ({"evaluate": {"pairs": "blimp", "machine": {"threads": 2}}}, "threads cannot be given here"),
        ({"evaluate_at": [1.0]}, "evaluate_at needs evaluate"),
        ({"evaluate": {"pairs": "blimp"}, "evaluate_at": [0.3, 1.0]}, "0.3 is not one of the points, 0.1, 0.2"),
        ({"evaluate": {"pairs": "blimp"}, "evaluate_at": [0.2]}, "evaluate_at must ascend and end with 1.0"),
    ],
)
def test_refusals(tmp_path, changes, reason) -> None:
    assert reason in error(tmp_path, **changes)


@pytest.mark.parametrize(
    ("base", "variants", "reason"),
    [
        ({}, {"a": None, "e": {"objective": "electra"}}, "e: objective: electra instead of mlm"),
        ({}, {"a": None, "m": {"objective": "multiple-choice"}}, "m: objective: multiple-choice instead of mlm"),
        ({"objective": "electra"}, {"a": None, "m": {"objective": "mlm"}}, "m: objective: mlm instead of electra"),
        ({}, {"a": None, "b": {"mlm": {"mask_rate": 0.3}}}, "b: mlm.mask_rate: 0.3 instead of 0.15"),
        ({}, {"a": {"mlm": {"whole_word": True}}, "b": None}, "b: mlm.whole_word: False instead of True"),
        (
            {"objective": "electra"},
            {"a": None, "b": {"electra": {"generator_scale": 0.5}}},
            "b: electra.generator_scale: 0.5 instead of 0.25",
        ),
        ({}, {"a": None, "b": {"first_length": 8}}, "8, 8, 8, 8, 8, 32 instead of 32, 32, 32, 32, 32, 32"),
    ],
)
def test_losses_that_cannot_be_compared_need_tasks(tmp_path, base, variants, reason, capsys) -> None:
    """Refused before anything is written or prepared: the data named here is empty."""
    (tmp_path / "empty.txt").touch()
    base = BASE | base | {"data": str(tmp_path / "empty.txt")}
    path = write(tmp_path, base=base, variants=variants)
    assert main(["ablate", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert reason in error and "Give tasks:" in error and not (tmp_path / "out").exists()
    assert ("checkpoints: [1.0]" in error) == ("first_length" in str(variants))
    pairs = {"evaluate": {"pairs": write_pairs(tmp_path / "pairs")}}
    for allowed in ({"tasks": ["cola"]}, pairs, {"variants": {"a": None, "b": {"position": "tupe-r"}}}):
        given = {"base": base, "variants": variants} | allowed
        assert main(["ablate", str(write(tmp_path, **given)), "--out", str(tmp_path / "out")]) == 2
        assert "empty.txt" in capsys.readouterr().err  # comes as far as the data


def test_the_baseline_needs_a_masked_head_for_pll(tmp_path, capsys) -> None:
    """A variant without one is left out; without the baseline's there is nothing to compare with."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "held-out.txt").write_text("A sentence.")
    values = {
        "base": BASE | {"data": str(tmp_path / "empty.txt")},
        "variants": {"m": None, "e": {"objective": "electra"}},
    }
    values["evaluate"] = {"pairs": write_pairs(tmp_path / "pairs"), "pll": str(tmp_path / "held-out.txt")}
    for baseline, reason in (("e", "e has no pseudo-log-likelihood: with objective electra"), ("m", "empty.txt")):
        assert main(["ablate", str(write(tmp_path, **values, baseline=baseline)), "--out", str(tmp_path / "out")]) == 2
        assert reason in capsys.readouterr().err


def test_warm_up_is_free_with_anneal(tmp_path) -> None:
    path = write(tmp_path, anneal={"points": [0.5, 1]}, variants={"a": None, "b": {"schedule": {"warmup": 9}}})
    ablation, _ = load_ablation(path)
    assert ablation.anneal == 0.1 and ablation.points == (0.5, 1.0)
    assert ablation.variants[1].options.schedule.warmup == 9


def test_the_command_needs_a_file(capsys) -> None:
    assert main(["ablate"]) == 2
    assert "configs/ablate/tiny.yaml" in capsys.readouterr().err


def test_the_examples() -> None:
    for path in (Path(__file__).parents[2] / "configs" / "ablate").glob("*.yaml"):
        assert len(load_ablation(path)[0].variants) > 1
