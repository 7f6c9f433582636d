"""What an ablation will run, before it runs: equal costs, jobs that are named by what they are, refusals, and the
report of curves that are known in closed form."""

import math
import re
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fastbert.config import from_dict
from fastbert.data.batches import validation_batches
from fastbert.data.stages import make_plan
from fastbert.errors import UserError
from fastbert.pretraining.evaluation import MASK_SEED
from fastbert.pretraining.options import PretrainOptions
from fastbert.studies.ablate.ablate import measured, report_ablation
from fastbert.studies.ablate.comparability import incomparable, planned_validations
from fastbert.studies.ablate.costs import equal_steps
from fastbert.studies.ablate.measures import AblationResults
from fastbert.studies.ablate.options import Budget
from fastbert.studies.engine.events import startable
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.shared.finetune_jobs import FINETUNE
from fastbert.training.optimizers import optimizer_flops
from tests.studies.conftest import VARIANTS, losses, time_steps


@pytest.fixture
def timed(planned, monkeypatch) -> None:
    """A step takes 0.1 s for each token of a sequence; with tupe-r three times that."""

    def seconds(setup, objective, seconds, plan) -> float:
        (stage,) = plan.stages
        return stage.length * (0.3 if setup.options.encoder.position == "tupe-r" else 0.1)

    time_steps(monkeypatch, seconds)


def test_equal_flops_are_steps_in_inverse_proportion(planned) -> None:
    _, study = planned(budget={"equal": "flops", "steps": 4000})
    first = study.variants[0]
    for variant in study.variants:
        # Of the objective itself, networks and heads.
        flops = variant.setup.objective().flops(8, 16)
        assert variant.flops == flops and variant.steps == round(4000 * first.flops / flops)
        assert variant.steps * flops == pytest.approx(4000 * first.flops, rel=1e-3)
        assert study.points[variant.name][-1].steps == variant.steps
    assert study.variants[2].steps < first.steps == 4000
    _, study = planned(budget={"equal": "flops", "flops": 1e9})
    assert study.variants[0].steps == round(1e9 / first.flops)


def test_equal_flops_count_muons_products(planned) -> None:
    variants = {"adamw": {"optimizer": {"name": "adamw"}}, "muon": {"optimizer": {"name": "muon"}}}
    _, study = planned(budget={"equal": "flops", "steps": 4000}, variants=variants)
    adamw, muon = study.variants
    update = optimizer_flops(muon.setup.objective().named_parameters(), muon.setup.options.optimizer)
    assert muon.flops - adamw.flops == update > 0 and muon.steps == round(4000 * adamw.flops / muon.flops)


def test_budgets_in_every_unit(planned) -> None:
    _, study = planned()
    variants = [
        replace(v, step_seconds={(8, 16): took}) for v, took in zip(study.variants, (0.5, 1.0, 2.0), strict=True)
    ]
    assert equal_steps(Budget("minutes", minutes=2), variants) == [240, 120, 60]
    assert equal_steps(Budget("minutes", steps=100), variants) == [100, 50, 25]
    assert equal_steps(Budget("steps", minutes=2), variants) == [240, 240, 240]
    assert equal_steps(Budget("steps", tokens=128_000), study.variants) == [1000, 1000, 1000]


def test_a_later_variant_is_timed_relative_to_the_baseline(planned, monkeypatch) -> None:
    """On a machine that is half as fast by now, it takes three times as long as the baseline then and now."""
    variants = {"a": None, "b": {"position": "tupe-r"}}
    time_steps(monkeypatch, lambda setup, *_: 0.3 if setup.options.encoder.position == "tupe-r" else 0.1)
    _, before = planned(variants={"a": None, "c": {"norm": "pre"}})
    seconds = iter([0.6, 0.2] * 5)
    time_steps(monkeypatch, lambda setup, *_: next(seconds))
    _, study = planned(known=before.seconds, variants=variants)
    assert [variant.step_seconds[8, 16] for variant in study.variants] == pytest.approx([0.1, 0.3])
    assert study.seconds.items() >= {key: before.seconds[key] for key in study.seconds.keys() & before.seconds}.items()
    assert next(seconds, None) is None


def test_stages_cost_what_their_steps_do(planned) -> None:
    """A variant with short sequences first: its points and its budget are sums over its steps."""
    variants = {"all long": None, "short first": {"first_length": 4, "first_fraction": 0.5}}
    _, study = planned(variants=variants, budget={"equal": "flops", "steps": 100}, checkpoints=[0.25, 1.0])
    long, short = study.variants
    flops = short.setup.objective().flops
    early, end = study.points["short first"]
    assert short.flops_to(end) == pytest.approx(100 * long.flops, rel=0.01) and short.steps != 100
    half = round(0.5 * short.steps)
    assert short.flops_to(replace(early, steps=half + 3)) == half * flops(32, 4) + 3 * flops(8, 16)
    assert long.flops_to(study.points["all long"][0]) == 25 * flops(8, 16)
    assert long.validation_options != short.validation_options  # sequences at the first point differ in length
    _, study = planned(variants=variants, budget={"tokens": 12800})
    assert [variant.steps for variant in study.variants] == [100, 100]


def test_short_sequences_last_until_the_annealing(planned, timed) -> None:
    """In every training of a variant, for any first_fraction; costs and minutes are sums over its steps."""
    variants = {"all long": None, "short first": {"first_length": 4}}
    _, study = planned(variants=variants, budget={"steps": 100}, anneal={"points": [0.5, 1.0], "fraction": 0.2})
    flops = study.variants[1].setup.objective().flops
    trunk, early = (job for job in study.jobs if job.model == "short first")
    for job, point, start in zip((early, trunk), study.points["short first"], (50, 100), strict=True):
        options = from_dict(PretrainOptions, job.options, "job")
        plan = make_plan(options.stages, options.batch_size, options.length, options.steps)
        assert plan.describe(options.steps).endswith(f"{start} of 32 x 4 tokens, {start // 5} of 8 x 16 tokens")
        variant = study.variants[1]
        assert variant.flops_to(point) == start * flops(32, 4) + start // 5 * flops(8, 16)
        assert variant.minutes_to(point) == pytest.approx((start * 0.4 + start // 5 * 1.6) / 60)
    with pytest.raises(UserError, match="drop initial_batch_size or anneal"):
        planned(base={"initial_batch_size": 4}, anneal={"points": [0.5, 1.0]})


def test_minutes_are_measured_once(planned, monkeypatch, works) -> None:
    """In rounds, the variants in turn; an earlier call's times are used again. What disturbs three rounds of five, one
    variant more than the other, changes no plan."""
    asked = []

    def timed(setup, objective, seconds, plan) -> float:
        asked.append(setup.options.objective)
        took = 0.05 if setup.options.objective == "mlm" else 0.06
        return took * (1 + len(asked) if len(asked) < 7 else 1)

    time_steps(monkeypatch, timed)
    variants = {"a": None, "e": {"objective": "electra"}}
    _, study = planned(variants=variants, budget={"equal": "minutes", "minutes": 0.1})
    assert asked == ["mlm", "electra"] * 5
    assert works["timing steps"].done == works["timing steps"].total == 10
    assert [min(rounds) for rounds in study.seconds.values()] == pytest.approx([0.05, 0.06])
    assert [statistics.median(rounds) for rounds in study.seconds.values()] == pytest.approx([0.1, 0.18])
    assert [v.steps for v in study.variants] == [120, 100]
    _, again = planned(study.seconds, variants=variants, budget={"equal": "minutes", "minutes": 0.2})
    assert len(asked) == 10 and [v.steps for v in again.variants] == [240, 200]


def test_annealing(planned) -> None:
    """A quarter of the steps more, after 40 and, as a branch of that training, after 20 of 40 steps; the warm-up is
    counted in steps."""
    base = {"schedule": {"name": "cosine", "warmup": 0.1}}
    _, study = planned(
        base=base, variants={"a": None, "b": {"norm": "pre"}}, anneal={"points": [0.5, 1], "fraction": 0.25}
    )
    trunk, early = study.jobs[:2]
    assert [job.kind for job in study.jobs] == ["pretrain", "branch"] * 2
    assert trunk.options["milestones"] == "20" and early.options["milestones"] is None
    assert early.after == (trunk.id,) and early.identity["start"] == 20 and trunk.identity["start"] == 0
    for job, start, steps in ((early, 20, 25), (trunk, 40, 50)):
        assert job.options["steps"] == steps
        schedule = job.options["schedule"]
        assert schedule["name"] == "wsd" and schedule["warmup"] == 4.0 and schedule["final"] == 0.0
        assert round(schedule["decay"] * steps) == steps - start
    assert [point.steps for point in study.points["a"]] == [25, 50]
    assert early.cost == 5 * study.variants[0].flops and trunk.cost == 50 * study.variants[0].flops


def test_jobs_are_named_by_what_they_are(planned) -> None:
    """Names, idle options and how many workers there are change nothing; seeds, points and active options do."""

    def ids(**changes) -> list[str]:
        return [job.id for job in planned(**changes)[1].jobs]

    two = {"a": None, "b": {"position": "tupe-r"}}
    same = ids(variants=two)
    assert len(set(same)) == 2
    assert ids(variants={"first": None, "second": {"position": "tupe-r"}}) == same
    assert ids(variants=two, base={"cls_attention": "untied", "electra": {"loss_weight": 9.0}}) == same
    more = ids(variants={**two, "c": {"norm": "pre"}}, seeds=[1, 0])
    assert more[3:5] == same and len(set(more)) == 6
    for changes in (
        {"base": {"dropout": 0.3}},
        {"budget": {"steps": 41}},
        {"threads": 2},
        {"checkpoints": [1.0]},
        {"base": {"eval_sequences": 9}},
    ):
        assert not set(ids(variants=two, **changes)) & set(same)


def test_what_shows_in_the_plan_only(planned, tmp_path) -> None:
    def error(**changes) -> str:
        with pytest.raises(UserError) as caught:
            planned(**changes)
        assert str(tmp_path / "x.yaml") in str(caught.value)
        return str(caught.value)

    text = error(variants={"a": None, "b": {"cls_attention": "tied"}})
    assert "a and b are the same training" in text  # of absolute positions
    assert "two of them are the same step" in error(budget={"steps": 4})
    assert "variants: b: " in error(variants={"a": None, "b": {"heads": 3}})
    assert "heads 3 do not divide" in error(variants={"a": None, "b": {"heads": 3}})
    late = {"schedule": {"warmup": 15}}
    text = error(variants={"a": None, "b": late}, anneal={"points": [0.2, 1.0]})
    assert "variants: b: a warm-up of 15" in text
    assert "x.yaml: a, nowhere.yaml: " in error(variants={"a": None}, tasks=["nowhere.yaml"])
    assert "less than one batch" in error(base={"batch_size": 100_000})


def test_all_variants_read_the_same_data(corpus, planned, tmp_path, monkeypatch) -> None:
    """Rare words are listed for the widest band, so that bands of notes do not make different data."""
    monkeypatch.chdir(tmp_path)
    bands = {"a": {"min_count": 20, "max_count": 90}, "b": {"min_count": 5, "max_count": 60}}
    bands = {name: {**band, "fraction": 1.0} for name, band in bands.items()}
    variants = {"plain": None, **{name: {"notes": {"enabled": True, **band}} for name, band in bands.items()}}
    base = {"data": str(corpus), "validation_fraction": 0.1}
    _, study = planned(base=base, variants=variants)
    assert len({variant.setup.dataset.folder for variant in study.variants}) == 1
    assert len({job.identity["data"] for job in study.jobs}) == 1
    assert study.variants[2].setup.note_corpus.rarest >= 5 and study.variants[1].setup.note_corpus.commonest > 60


def test_jobs_wait_for_what_they_need(planned) -> None:
    _, study = planned(variants={"a": None, "b": {"norm": "pre"}}, anneal={"points": [0.3, 0.5, 1.0]})
    rows: dict[str, dict] = {}
    last = replace(study.jobs[1], id="last", after=(study.jobs[1].id,))  # needs a branch of the first trunk
    queue = startable([*study.jobs, last], rows)
    trunks = [job for job in study.jobs if job.kind == "pretrain"]
    assert [next(queue), next(queue), next(queue)] == [*trunks, None]
    rows[trunks[1].id] = {"status": "done"}
    assert [next(queue).after, next(queue).after] == [(trunks[1].id,)] * 2
    assert next(queue) is None
    rows[trunks[0].id] = {"status": "failed"}
    assert next(queue, "the end") == "the end"


# --- from rows to a report


def test_a_report_of_known_curves(planned, timed, tmp_path, capsys) -> None:
    """tupe-r learns twice as fast at three times the time a step, pre-norm half as fast."""
    variants = {**VARIANTS, "pre": {"norm": "pre"}}
    points = [round(0.05 * point, 2) for point in range(1, 21)]
    ablation, study = planned(variants=variants, seeds=3, checkpoints=points, budget={"steps": 200})
    rows = losses(study, {"absolute": 4.0, "tupe-r": 2.0, "electra": 1.0, "pre": 8.0})
    results = AblationResults(study, rows)
    (measure,) = results.measures
    assert list(measure.curves) == ["absolute", "tupe-r", "pre"] and not results.hardly_learned()
    assert report_ablation(tmp_path / "out", "known", ablation, results) == 0
    printed, remarks = capsys.readouterr()
    base = statistics.fmean(measure.finals("absolute").values())
    better, worse = (f"{base - statistics.fmean(measure.finals(name).values()):+.4f}" for name in ("tupe-r", "pre"))
    (line,) = [line for line in printed.splitlines() if line.startswith("tupe-r")]
    flops = 50 * study.variants[1].flops / study.variants[0].flops
    assert line.split() == ["tupe-r", "reached", better, "3", "50", "%", f"{flops:.0f}", "%", "150", "%"]
    (line,) = [line for line in printed.splitlines() if line.startswith("pre")]
    assert line.split() == ["pre", "not", "reached", worse, "3", "–", "–", "–"]
    reason = "electra is not compared by validation loss, because its validation differs: objective: electra"
    assert "electra" not in printed and reason in remarks
    assert printed.startswith("Fraction of absolute's cost at which its final quality is reached: validation loss\n")
    limit = "with 3 seeds it cannot be less than 0.25 (0.5 adjusted over 2)"
    assert limit in printed.replace("\n", " ")
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert (
        "The losses of electra are not comparable" in report
        and "in rounds in which the variants alternate: the fastest round" in report
    )
    assert "\n- `tupe-r`: position tupe-r (instead of absolute)\n" in report
    assert "## Fraction of the baseline's cost to reach its final quality\n" in report
    assert f"## Not compared\n\n- {reason} instead of mlm\n" in report and limit in report
    tables = [[cell.strip() for cell in line.strip("| ").split("|")] for line in report.splitlines() if line[:1] == "|"]
    heads = [number for number, cells in enumerate(tables) if cells[0] == "variant"]
    (ends,) = [tables[number:] for number in heads if tables[number][3:] == ["masked loss", "other medians"]]
    assert ends[2][3] == f"{statistics.median(row['validations'][-1]['loss'] for row in list(rows.values())[::4]):.4f}"
    assert ends[4][:4] == ["electra", "electra", "3", "–"] and ends[4][4].startswith("incomparable loss (electra) 1.")
    (finals,) = [tables[number:] for number in heads if "p (sign flips)" in tables[number]]
    assert finals[3][0] == "tupe-r" and finals[3][-2:] == ["0.250", "0.500"]
    assert {"curves-0.svg", "fractions.svg", "report.html"} <= {p.name for p in (tmp_path / "out" / "report").iterdir()}
    assert (tmp_path / "out" / "report" / "report.html").read_text().count("<svg") == 2


def test_a_baseline_that_has_hardly_learned(planned, tmp_path, capsys) -> None:
    ablation, study = planned(variants={"a": None, "b": {"norm": "pre"}}, seeds=2)
    gap = study.unigram_entropy - 1 - 1.4 - 4 * math.exp(-1)
    rows = losses(study, {"a": 1.0, "b": 0.1}, gap)
    results = AblationResults(study, rows)
    assert results.hardly_learned() and results.masked_loss() == pytest.approx(study.unigram_entropy - 1.4, abs=1e-3)
    assert not AblationResults(study, losses(study, {"a": 1.0, "b": 0.1}, gap - 0.11)).hardly_learned()
    report_ablation(tmp_path / "out", "plateau", ablation, results)
    assert "undecided: the baseline has hardly learned" in capsys.readouterr().out


def test_a_measure_that_stands_still_is_remarked_on(planned, tmp_path) -> None:
    ablation, study = planned(variants={"a": None, "b": {"norm": "pre"}}, seeds=2, checkpoints=[0.5, 1.0])
    rows = losses(study, {"a": 1.0, "b": 0.5})
    out = tmp_path / "out"
    report_ablation(out, "moves", ablation, AblationResults(study, rows))
    assert "The baseline itself is at its final value" not in (out / "report" / "report.md").read_text()
    for row in rows.values():
        for values in row["validations"]:
            values["loss"] = 2.0
    report_ablation(out, "still", ablation, AblationResults(study, rows))
    text = "The baseline itself reaches its final value by at most 50 % of its steps"
    assert text in (out / "report" / "report.md").read_text()


def test_a_baseline_of_two_networks_is_judged_by_the_small_one(planned, tmp_path, capsys) -> None:
    variants = {"e": {"objective": "electra"}, "t": {"objective": "electra", "position": "tupe-r"}}
    ablation, study = planned(variants=variants)
    rows = losses(study, {"e": 1.0, "t": 1.0}, gap=20.0)
    for row in rows.values():
        for values in row["validations"]:
            values["mlm_loss"] = 3.0
    results = AblationResults(study, rows)
    assert results.masked_loss() == 3.0 and not results.hardly_learned() and len(results.measures) == 1
    report_ablation(tmp_path / "out", "small", ablation, results)
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "The masked loss of the baseline's generator" in report and "may also mean easier inputs" in report
    assert "may also mean easier inputs" in capsys.readouterr().err


def test_masks_decide_what_is_comparable(planned) -> None:
    variants = {
        "a": None,
        "same": {"mlm": {"mask_token_fraction": 1.0, "random_token_fraction": 0.0}},  # of training only
        "other": {"mlm": {"mask_rate": 0.3}},
        "words": {"mlm": {"whole_word": True}},
    }
    _, study = planned(variants=variants)
    first, *others = (variant.validation_options for variant in study.variants)
    assert [options == first for options in others] == [True, False, False]


def test_lengths_decide_what_is_comparable(planned, timed) -> None:
    """Those of the sequences at the points: with anneal, all are measured at the full length."""
    variants = {"a": None, "short first": {"first_length": 4, "first_fraction": 0.5}}
    _, study = planned(variants=variants, checkpoints=[0.5, 1.0])
    text = "sequence length at the points: 4, 16 instead of 16, 16"
    assert study.incomparable == {"short first": text}
    for points in ({"checkpoints": [0.75, 1.0]}, {"anneal": {"points": [0.5, 1.0]}}):
        ablation, study = planned(variants=variants, **points)
        assert study.incomparable == {} and incomparable(planned_validations(ablation)) == {}


def test_the_same_is_asked_where_losses_are_compared(planned) -> None:
    """The masked positions and their words in the validation, of every variant that is comparable and of none other."""
    variants = {
        "a": None,
        "shown": {"mlm": {"mask_token_fraction": 1.0, "random_token_fraction": 0.0}},
        "documents": {"document_mask": True},
        "notes": {"notes": {"enabled": True, "half_window": 2}},
        "tupe": {"position": "tupe-r", "norm": "pre", "optimizer": {"name": "lamb"}, "dropout": 0.3},
        "rate": {"mlm": {"mask_rate": 0.4}},
        "words": {"mlm": {"whole_word": True}},
    }
    ablation, study = planned(variants=variants)
    asked = {}
    for variant in study.variants:
        setup = variant.setup
        batches = validation_batches(setup.rows("validation"), 8, 8, setup.device)
        (inputs,) = [setup.objective().sample(batch, MASK_SEED, 0, "validation-mask") for batch in batches]
        asked[variant.name] = [inputs.positions.tolist(), inputs.targets.tolist()]
    assert {name for name in asked if asked[name] != asked["a"]} == {"rate", "words"} == set(study.incomparable)
    assert study.incomparable["rate"] == "mlm.mask_rate: 0.4 instead of 0.15"
    assert incomparable(planned_validations(ablation)) == study.incomparable


def test_live_values_are_of_what_is_compared(planned, timed, capsys) -> None:
    """A loss of another objective is named as such in its line, and is in no cell under the baseline's."""
    _, study = planned(variants={"m": None, "e": {"objective": "electra"}})
    rows = losses(study, {"m": 1.0, "e": 1.0}, gap=30.0)
    for job in study.jobs:
        rows[job.id] |= {"objective": "electra" if job.model == "e" else "mlm"}
    shown = partial(measured, incomparable=study.incomparable)
    board = LiveStatus(study.jobs, {}, shown, {("e", "pretraining")})
    for job in study.jobs:
        board.ended(job, rows[job.id])
    first, second = (f"{rows[job.id]['validations'][-1]['loss']:.4f}" for job in study.jobs)
    error = capsys.readouterr().err
    assert f"seed 0: validation loss {first}, " in error and f"incomparable loss (electra) {second}, " in error
    assert board._fitting(80, 24)[1:] == [["m", f"1/1  {first}"], ["e", "1/1"]]


def test_no_variant_leaves_a_report_unnamed(planned, timed, words, tmp_path, capsys) -> None:
    """Not one without a finished training, nor a measure without the baseline's value."""
    changes = {"seeds": 2, "tasks": [words], "epochs": 1, "tasks_at": [1.0], "checkpoints": [0.5, 1.0]}
    ablation, study = planned(variants={"a": None, "gone": {"norm": "pre"}}, **changes)
    rows = losses(study, {"a": 1.0, "gone": 1.0})
    dev = {"dev": {"dev": {"accuracy": 0.5}}}
    for job in study.jobs:
        if job.kind == "finetune":
            rows[job.id] |= {"metrics": ["accuracy"], "best": dev, "last": dev, **job.setting}
        if job.model == "gone":
            del rows[job.id]
    report_ablation(tmp_path / "out", "gaps", ablation, AblationResults(study, rows))
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "| words, accuracy x 100 | gone    |     0 |         – |        – | undecided: no common seed" in report
    assert re.search(r"\| gone +\| mlm +\| +0 \| +– \| +–", report)
    rows = {key: row for key, row in rows.items() if row["kind"] != "finetune"}
    capsys.readouterr()
    report_ablation(tmp_path / "out", "gaps", ablation, AblationResults(study, rows))
    line = "no variant is compared by words, score x 100: a has no final value"
    assert line in capsys.readouterr().err and line in (tmp_path / "out" / "report" / "report.md").read_text()


def test_no_two_trainings_of_a_variant_have_the_same_head(planned, words) -> None:
    changes = {"tasks": [words], "epochs": 1, "tasks_at": [1.0], "checkpoints": [1.0], "seeds": 2, "trials": 2}
    _, study = planned(variants={"a": None, "b": {"norm": "pre"}}, **changes)
    for variant in ("a", "b"):
        tunings = [job for job in study.jobs if job.kind == FINETUNE and job.model == variant]
        assert [(job.seed, job.options["first_seed"]) for job in tunings] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    on_cpu = study.variants[0].setup.device.type == "cpu"
    assert {job.memory > 5e8 for job in study.jobs} == {on_cpu}  # main memory, of pretrainings and fine-tunings


def test_the_best_setting_is_that_of_the_last_point(planned, words) -> None:
    """It is used at the others too, even if another one is better there."""
    changes = {"tasks": [words], "epochs": [1, 2], "tasks_at": [0.5, 1.0], "checkpoints": [0.5, 1.0]}
    _, study = planned(variants={"a": None, "b": {"norm": "pre"}}, **changes)
    accuracies, rows = {(0.5, 1): 0.9, (0.5, 2): 0.5, (1.0, 1): 0.6, (1.0, 2): 0.7}, losses(study, {"a": 1.0, "b": 1.0})
    for job in (job for job in study.jobs if job.kind == FINETUNE):
        dev = {"dev": {"accuracy": accuracies[job.setting["at"], job.setting["epochs"]]}}
        rows[job.id] |= job.setting | {"metrics": ["accuracy"], "best": {"dev": dev}}
    results = AblationResults(study, rows)
    assert results.best_setting(results.baseline, "words")[2] == 2
    (curve,) = results.task_curves(results.baseline, "words").values()
    assert [point.value for point in curve] == pytest.approx([50.0, 70.0])


def test_failures_are_reported(planned, tmp_path, capsys) -> None:
    ablation, study = planned(variants={"a": None, "b": {"norm": "pre"}}, anneal={"points": [0.3, 0.5, 1.0]}, seeds=2)
    rows = losses(study, {"a": 1.0, "b": 0.5})
    broken = next(job for job in study.jobs if job.model == "b" and job.seed == 1)
    rows[broken.id] |= {"status": "failed", "reason": "it diverged", "fix": "", "log": ["the end"]}
    skipped = {"status": "not run", "reason": "not run: pretraining, b, seed 1 failed", "fix": "", "log": []}
    for job in study.jobs:
        if job.after == (broken.id,):
            rows[job.id] |= skipped
    del rows[study.jobs[-1].id]  # the ablation was stopped before this job
    results = AblationResults(study, rows)
    assert report_ablation(tmp_path / "out", "broken", ablation, results) == 1
    captured = capsys.readouterr()
    assert "FAILED pretraining, b, seed 1\n  it diverged" in captured.err
    assert "NOT RUN annealing, b, seed 1: pretraining, b, seed 1 failed" in captured.err
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "it diverged" in report and "1 job did not run: pretraining, b, seed 1 failed. 1 more job did not" in report
    assert sorted(results.measures[0].finals("b")) == [0] and Path(tmp_path / "out" / "report" / "report.html").exists()
