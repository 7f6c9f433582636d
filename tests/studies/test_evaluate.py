"""Zero-shot evaluation in ablations and sweeps: which checkpoints are evaluated, figures and tests in the reports, and
what is refused before any job."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from fastbert.cli import main
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.hub.export import export_model
from fastbert.hub.load import load_pretrained
from fastbert.hub.names import exported_weights
from fastbert.model.encoder import initialize
from fastbert.objectives import OBJECTIVES
from fastbert.objectives.options import ObjectiveOptions
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot.pair_files import Pair
from fastbert.pretraining.zero_shot.pairs import measure_pairs
from fastbert.studies.ablate.ablate import report_ablation
from fastbert.studies.ablate.analysis import compare_variants
from fastbert.studies.ablate.measures import AblationResults
from fastbert.studies.ablate.pretrain_jobs import check_ablation_row
from fastbert.studies.engine.jobs import run_job
from fastbert.studies.engine.store import JOBS
from fastbert.studies.shared.evaluate_jobs import evaluate_job, fingerprints, hash_of
from fastbert.studies.sweep import sweep
from fastbert.studies.sweep.options import load_sweep
from fastbert.studies.sweep.sweep import check_sweep_row
from fastbert.studies.sweep.sweep_plan import plan_sweep
from fastbert.studies.sweep.zero_shot_report import ZeroShotResults, accuracy_table
from fastbert.training.options import MachineOptions
from tests.finetuning.conftest import WORDS, tiny_config
from tests.studies.conftest import CPU, losses, read_rows, without_times, write_pairs, write_sweep


def export(folder: Path, objective: str = "mlm", words: tuple[str, ...] = WORDS, **choices) -> str:
    """An export with random weights and the head of its objective."""
    config = tiny_config(vocab_size=len(words), **choices)
    options = (OBJECTIVES.options(objective) or ObjectiveOptions)().resolve(config)
    network = OBJECTIVES[objective](config, options, WordPiece(words), "reference")
    initialize(network, 0, config.initializer_std)
    WordPiece(words).save(folder / "tokenizer")
    export_model(config, exported_weights(network.state_dict()), folder / "tokenizer", folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def axes(tmp_path_factory) -> dict:
    """A sweep of two masked language models and an ELECTRA."""
    folder = tmp_path_factory.mktemp("evaluated")
    kinds = {"a": {}, "b": {"position": "tupe-r", "type_vocab_size": 0}, "e": {"objective": "electra"}}
    models = [{"name": name, "path": export(folder / name, **kind)} for name, kind in kinds.items()]
    (folder / "held-out.txt").write_text("She had it and he was bad. The good was in it. It is on the good.")
    evaluate = {"pairs": write_pairs(folder / "pairs"), "pll": str(folder / "held-out.txt"), "machine": CPU}
    return {"models": models, "evaluate": evaluate}


@pytest.fixture
def in_process(monkeypatch):
    """Jobs of a sweep run in this process; `stop_after` jobs it receives SIGTERM."""
    stop_after: list[int] = []

    def start(options, jobs, store, threads):
        for number, job in enumerate(jobs):
            if [number] == stop_after:
                signal.raise_signal(signal.SIGTERM)
                yield None
            yield job, None
            yield job, run_job(job.to_dict(), store.out / JOBS / job.id)

    monkeypatch.setattr(sweep, "start", start)
    return stop_after


def cells(text: str, head: str) -> list[list[str]]:
    """The rows of the table in Markdown whose head begins like `head`, a pattern."""
    table = re.search(rf"^\| {head}.*\n\|[-: |]*\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]


# --- sweeps


def test_a_sweep_without_tasks(axes, tmp_path, in_process, capsys) -> None:
    """Its figures are those of `fastbert evaluate`, its tests those of scipy; it continues after a signal."""
    path = write_sweep(tmp_path, axes)
    assert main(["sweep", path, "--out", str(tmp_path / "out")]) == 0
    printed, remarks = capsys.readouterr()
    assert "5 jobs: 5 evaluations\n" in remarks and "minimal pairs, a: accuracy 0." in remarks
    assert "e has no pseudo-log-likelihood: its encoder predicts no masked words" in remarks
    rows = {(row["model"], row["task"]): row for row in read_rows(tmp_path / "out")}
    assert len(rows) == 5 and all(row["seed"] is None and row["status"] == "done" for row in rows.values())
    options = EvaluateOptions(
        model=axes["models"][1]["path"], pairs=axes["evaluate"]["pairs"], machine=MachineOptions(threads=1, **CPU)
    )
    figures, row = measure_pairs(options), rows["b", "minimal pairs"]["pairs"]
    assert row == {name: figures[name] for name in row} and figures["count"] == 6
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    accuracies = {model: rows[model, "minimal pairs"]["pairs"] for model in "abe"}
    shown = {row[0]: row[1:] for row in cells(report, r"checkpoint \| score +\| accuracy")}
    for model, found in accuracies.items():
        score = "pll, salazar" if model != "e" else found["score"]
        assert shown[model][:2] == [score, f"{100 * found['accuracy']:.2f}"] and shown[model][3:] == ["6", "0", "–"]
    compared = {row[0]: row[1:] for row in cells(report, r"checkpoint \| verdict")}
    for model in "be":
        first, other = ([p["accuracy"] for p in accuracies[name]["paradigms"].values()] for name in ("a", model))
        assert compared[model][1:3] == ["3", f"{100 * (sum(other) - sum(first)) / 3:+.2f}"]
        test = ttest_rel(other, first)
        assert compared[model][4] == (
            f"{test.pvalue:.3f}" if len({a - b for a, b in zip(first, other, strict=True)}) > 1 else "–"
        )
    parts = accuracies["e"] | {"other_scores": {"generator": 0.5}}
    assert accuracy_table(ZeroShotResults({"e": parts}, {}, {})).rows[0][-1] == "generator 50.00"
    p = {model: float(row[4]) for model, row in compared.items() if row[4] != "–"}
    assert float(compared[min(p, key=p.get)][5]) == pytest.approx(min(1, len(p) * min(p.values())), abs=0.002)
    assert [row[0] for row in cells(report, r"phenomenon \| pairs")] == ["agreement", "islands"]
    found = [accuracies[name]["phenomena"]["agreement"]["accuracy"] for name in "ab"]
    agreement = cells(report, r"phenomenon \| verdict")[0]
    assert agreement[2:4] == ["2", f"{100 * (found[1] - found[0]):+.2f}"]
    assert "with 3 paradigms it cannot be less than 0.25 (0.5 adjusted over 2)" in report
    assert "The checkpoints are scored differently" in report and "values per token are comparable" in report
    losses = {row[0]: row[2:] for row in cells(report, r"checkpoint \| score +\| sentences")}
    figures = rows["a", "pseudo-log-likelihood"]["pll"]
    assert set(losses) == {"a", "b"}
    assert losses["a"][1] == f"{figures['nats_per_token']:.4f} ± {figures['nats_per_token_error']:.4f}"
    assert "Minimal pairs, accuracy x 100" in printed and losses["a"][1] in printed and "## Scores" not in report
    check_ablation_row(rows["a", "pseudo-log-likelihood"], "a row")
    for damaged in ({"pairs": {}}, {"seconds": None}):
        with pytest.raises(UserError, match="is damaged"):
            check_sweep_row(rows["a", "minimal pairs"] | damaged, "a row")
        with pytest.raises(UserError, match="is damaged"):
            check_ablation_row(rows["a", "minimal pairs"] | damaged, "a row")
    # Stopped after two jobs, and continued.
    in_process.append(2)
    assert main(["sweep", path, "--out", str(tmp_path / "stopped")]) == 143
    in_process.clear()
    assert main(["sweep", path, "--out", str(tmp_path / "stopped")]) == 0
    assert "5 jobs: 5 evaluations; 2 done before" in capsys.readouterr().err
    assert without_times(read_rows(tmp_path / "stopped")) == without_times(read_rows(tmp_path / "out"))


def test_losses_per_token_need_one_tokenizer(axes, tmp_path, in_process, capsys) -> None:
    """Bits per byte are shown instead, with the reason."""
    other = export(tmp_path / "other", words=(*WORDS, "peace"))
    models = [axes["models"][0], {"name": "other", "path": other}]
    evaluate = {"pll": axes["evaluate"]["pll"], "machine": CPU}
    path = write_sweep(tmp_path, axes, models=models, evaluate=evaluate)
    assert main(["sweep", path, "--out", str(tmp_path / "out")]) == 0
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert re.search(r"\| checkpoint \| score +\| sentences \| +nats per word \| +bits per byte \|\n", report)
    assert "Bits per byte compare checkpoints only if their tokenizers normalize text equally" in report
    assert "nats per token" not in capsys.readouterr().out


def test_data_that_changed_is_refused(axes, tmp_path) -> None:
    """Between the plan and the job; and the model of a sweep, but not the names of files."""
    folder = Path(write_pairs(tmp_path / "pairs"))
    evaluate = axes["evaluate"] | {"pairs": str(folder)}
    grid, options = load_sweep(write_sweep(tmp_path, axes, models=axes["models"][:1], evaluate=evaluate))
    pairs, pll = plan_sweep(grid, options).jobs
    (folder / "verb.jsonl").rename(folder / "other.jsonl")
    (folder / "other.jsonl").write_text((folder / "other.jsonl").read_text().replace("}", ', "UID": "verb"}'))
    assert evaluate_job(pairs.to_dict(), tmp_path / "run")["status"] == "done"
    assert plan_sweep(grid, options).jobs[0].id == pairs.id
    with (folder / "other.jsonl").open("a") as file:
        file.write(json.dumps({"sentence_good": "he had it", "sentence_bad": "he it had"}) + "\n")
    outcome = evaluate_job(pairs.to_dict(), tmp_path / "run")
    assert outcome["reason"] == "the data changed after the study had started" and outcome["status"] == "failed"
    assert plan_sweep(grid, options).jobs[0].id != pairs.id
    two, _ = load_sweep(write_sweep(tmp_path, axes, models=axes["models"][:1], evaluate=evaluate, threads=2))
    assert plan_sweep(two, options).jobs[1].id != pll.id and plan_sweep(grid, options).jobs[1].id == pll.id
    changed = pll.to_dict() | {"identity": pll.identity | {"model": "01234567"}}
    assert evaluate_job(changed, tmp_path / "run")["reason"] == "the model changed after the study had started"
    pretrained = load_pretrained(axes["models"][0]["path"])
    other = {name: w + 1 if name == "head.dense.bias" else w for name, w in pretrained.weights.items()}
    assert fingerprints(replace(pretrained, weights=other))["model"] != fingerprints(pretrained)["model"]


def test_models_that_score_nothing_are_refused_before_any_job(axes, models, tmp_path, capsys) -> None:
    """An encoder without a head; sentences longer than the positions; a damaged file of pairs."""

    def refused(**changes) -> str:
        assert main(["sweep", write_sweep(tmp_path, axes, **changes), "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return " ".join(capsys.readouterr().err.split())

    only_pairs = {"evaluate": {"pairs": axes["evaluate"]["pairs"], "machine": CPU}}
    error = refused(models=[{"name": "bare", "path": models["narrow"]}], **only_pairs)
    assert "sweep.yaml: bare, evaluate: pairs: " in error and "has no MLM head" in error
    long = Path(write_pairs(tmp_path / "long")) / "long.jsonl"
    long.write_text(json.dumps({"sentence_good": "it " * 29, "sentence_bad": "it"}))
    error = refused(evaluate={"pairs": str(long), "machine": CPU})
    assert "long.jsonl, line 1: sentence_good (31 tokens) is longer than the 30 positions" in error
    long.write_text(json.dumps({"sentence_god": "it", "sentence_bad": "it"}))
    assert "evaluate: pairs: " in (error := refused(evaluate={"pairs": str(long)})) and "line 1 has no key" in error
    long.unlink()
    assert "there are no minimal pairs at" in refused(evaluate={"pairs": str(long)})
    assert "seeds needs fine-tuning, but there are no tasks" in refused(seeds=2)
    assert "tasks is missing" in refused(evaluate=None)


def test_jobs_for_a_cluster_need_no_device_here(axes, tmp_path) -> None:
    """The nodes have the GPU: the plan checks the models without one."""
    evaluate = {"evaluate": axes["evaluate"] | {"machine": {"device": "cuda:97"}}}
    jobs = plan_sweep(*load_sweep(write_sweep(tmp_path, axes, backend="ray", **evaluate))).jobs
    assert {job.device for job in jobs} == {job.options["machine"]["device"] for job in jobs} == {"cuda:97"}
    with pytest.raises(UserError, match="cuda"):
        plan_sweep(*load_sweep(write_sweep(tmp_path, axes, **evaluate)))


# --- ablations


@pytest.fixture
def evaluated(planned, tmp_path):
    """Changes of the YAML file -> the ablation and plan with pairs and pll."""
    (tmp_path / "held-out.txt").write_text("The people of the States are free. We shall have peace.")
    data = {"pairs": write_pairs(tmp_path / "pairs"), "pll": str(tmp_path / "held-out.txt")}
    return lambda **changes: planned(**{"evaluate": data, "anneal": {"points": [0.5, 1.0]}, **changes})


def test_which_checkpoints_are_evaluated(evaluated, tmp_path) -> None:
    """Those of all points, or of evaluate_at, with every seed; an encoder without a masked head has no pseudo-log-
    likelihood. A job is what defines its result, and waits for the training it evaluates."""
    _, study = evaluated(seeds=2)
    jobs = [job for job in study.jobs if job.kind == "evaluate"]
    found = [(job.model, job.task, job.setting["at"], job.seed) for job in jobs]
    pairs = [(name, "minimal pairs", at, seed) for name in study.points for at in (0.5, 1.0) for seed in (0, 1)]
    pll = [(name, "pseudo-log-likelihood", at, seed) for name, _, at, seed in pairs if name != "electra"]
    assert sorted(found) == sorted([*pairs, *pll])
    points = {(name, p.seed, p.fraction): p for name, found in study.points.items() for p in found}
    for job in jobs:
        point = points[job.model, job.seed, job.setting["at"]]
        run = tmp_path / "out" / "jobs" / point.job / "run"
        assert job.after == (point.job,) and job.options["model"] == f"{run}/checkpoints/step-{point.steps:08d}"
        assert job.options["machine"]["threads"] == 1
    _, last = evaluated(evaluate_at=[1.0])
    assert [job.setting["at"] for job in last.jobs if job.kind == "evaluate"] == [1.0] * 5


def test_an_evaluation_is_what_defines_its_result(evaluated, tmp_path) -> None:
    def ids(**changes) -> list[str]:
        study = evaluated(variants={"a": None}, evaluate_at=[1.0], **changes)[1]
        return [job.id for job in study.jobs if job.kind == "evaluate"]

    before = ids()
    data = {"pairs": str(tmp_path / "pairs"), "pll": str(tmp_path / "held-out.txt")}
    assert ids(evaluate=data | {"machine": {"micro_batch_size": 4}}) == before
    for changes in ({"pll_form": "word-l2r"}, {"machine": {"precision": "bf16"}}):
        assert not set(ids(evaluate=data | changes)) & set(before)
    assert not set(ids(evaluate=data, threads=2)) & set(before)
    pairs, pll = ids(evaluate=data | {"sentences": 1})
    assert pairs == before[0] and pll != before[1]
    pairs, pll = ids(evaluate=data | {"length": 12})
    assert pairs != before[0] and pll != before[1]
    (tmp_path / "pairs" / "verb.jsonl").unlink()
    assert ids()[0] != before[0] and ids()[1] == before[1]


def test_pairs_that_are_too_long_are_reported_once(evaluated, tmp_path, capsys) -> None:
    """Encodings that extrapolate and those that do not are checked separately."""
    with open(tmp_path / "pairs" / "verb.jsonl", "a") as file:
        file.write(json.dumps({"sentence_good": "the people " * 6, "sentence_bad": "people the " * 6}) + "\n")
    evaluated(evaluate={"pairs": str(tmp_path / "pairs"), "length": 12})
    assert capsys.readouterr().err.count("of more than 12 tokens") == 1


def test_the_hash_of_the_data_covers_all_of_it() -> None:
    pair = Pair("the cat", "cat the", "u", "p", "file, line 1")
    before = hash_of([pair], [])
    assert hash_of([pair._replace(where="other, line 2")], []) == before
    changed = [hash_of([pair._replace(**{name: "z"})], []) for name in ("good", "bad", "paradigm", "phenomenon")]
    changed += [hash_of([], list(texts)) for texts in ("ab", "ba", "ac", "a")]
    assert len({before, *changed}) == 9


def test_phenomena_are_compared_over_their_paradigms() -> None:
    def figures(*accuracies: float) -> dict:
        paradigms = {f"u{n}": {"accuracy": a, "phenomenon": "pq"[n % 2]} for n, a in enumerate(accuracies)}
        return {"phenomena": {"p": {}, "q": {}}, "paradigms": paradigms}

    results = ZeroShotResults({"a": figures(0.5, 0.5, 0.6, 0.7), "b": figures(0.6, 0.9, 0.8, 0.8)}, {}, {})
    found = results.by_phenomenon("a", "b")
    assert {name: line.result.n for name, line in found.items()} == {"p": 2, "q": 2}
    assert [abs(line.result.mean) for line in found.values()] == pytest.approx([0.15, 0.25])


def test_pairs_and_pll_are_measures_with_the_same_statistics(evaluated, tmp_path, capsys) -> None:
    """Accuracies and losses that grow with the steps; tests against scipy."""
    ablation, study = evaluated(seeds=3, budget={"steps": 100})
    rows = losses(study, dict.fromkeys(("absolute", "tupe-r", "electra"), 1.0), gap=-1.0)
    gains = {"absolute": 0.0, "tupe-r": 0.2, "electra": -0.1}
    noise = {"absolute": (0.0, 0.01, 0.03), "tupe-r": (0.01, 0.03, 0.04), "electra": (0.02, 0.01, 0.05)}
    finals = {name: [gains[name] + noise[name][seed] for seed in range(3)] for name in gains}
    for job in (job for job in study.jobs if job.kind == "evaluate"):
        value = job.setting["at"] / 2 + finals[job.model][job.seed]
        one = {"accuracy": value, "low": 0.0, "high": 1.0, "count": 4, "ties": job.seed}
        figures = one | {"score": "discriminator" if job.model == "electra" else "pll", "phenomena": {"islands": one}}
        figures |= {"other_scores": {"generator": value / 2} if job.model == "electra" else {}}
        rows[job.id] |= {job.identity["evaluation"]: figures | {"nats_per_token": 5 - value}}
    results = AblationResults(study, rows)
    assert [measure.name for measure in results.measures] == [
        "minimal pairs, accuracy x 100",
        "pseudo-log-likelihood, nats per token",
        "validation loss",
    ]
    pairs, pll, _ = results.measures
    assert pairs.higher and list(pairs.curves) == ["absolute", "tupe-r", "electra"] and pairs.along
    assert not pll.higher and list(pll.curves) == ["absolute", "tupe-r"]
    assert pairs.finals("tupe-r")[1] == pytest.approx(73.0) and pll.finals("tupe-r")[1] == pytest.approx(4.27)
    _, better, worse = compare_variants(pairs, False)
    test = ttest_rel(finals["tupe-r"], finals["absolute"])
    assert better.result.p_t == pytest.approx(test.pvalue) and better.p == pytest.approx(2 * test.pvalue)
    assert better.result.mean == pytest.approx(20 + 4 / 3) and better.verdict == "reached"
    assert worse.verdict == "not reached" and compare_variants(pll, False)[1].verdict == "reached"
    assert better.fractions["steps"].values == pytest.approx((0.58, 0.56, 0.58))
    report_ablation(tmp_path / "out", "known", ablation, results)
    reason = "electra is not compared by pseudo-log-likelihood: with objective electra the encoder predicts no masked"
    printed, remarks = capsys.readouterr()
    assert reason in remarks and "quality is reached: minimal pairs, accuracy x 100" in printed
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "## By minimal pairs, accuracy x 100" in report and reason in report
    shown = {row[0]: row[1:] for row in cells(report, r"variant +\| score +\| by other")}
    assert shown["tupe-r"] == ["pll", "–", "1", "73.0"]
    assert shown["electra"] == ["discriminator", "generator 21.0", "1", "42.0"]
    assert [row[2] for row in cells(report, r"zero-shot +\| data")] == ["6 pairs in 3 paradigms", "2 sentences"]


def test_sentences_beyond_the_positions_are_refused_before_any_job(evaluated, tmp_path) -> None:
    """Unless the position encodings of all variants continue."""
    (tmp_path / "pairs" / "long.jsonl").write_text(json.dumps({"sentence_good": "it", "sentence_bad": "the " * 15}))
    with pytest.raises(
        UserError, match=r"x.yaml: absolute, evaluate: pairs: .*sentence_bad \(17 tokens\) is longer than"
    ):
        evaluated()
    variants = {"tupe-r": {"position": "tupe-r"}, "rope": {"position": "rope"}}
    assert len(evaluated(variants=variants)[1].evaluations[0].pairs) == 7
