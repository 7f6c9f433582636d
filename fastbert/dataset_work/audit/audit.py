"""`fastbert audit`: scores every example by a model that was not trained on it, and reports what is suspicious.

out/config.yaml     the options
out/manifest.json   definition of the experiment: options, model, data
out/folds/          scores of the folds
out/audit.jsonl     a line for each example
out/audit.json      all figures of the report
out/report.html     the page, also as report.md
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastbert import config as configuration
from fastbert.dataset_work.audit.agreement import disagreements, fleiss_kappa, pairs_of
from fastbert.dataset_work.audit.duplicates import with_different_labels
from fastbert.dataset_work.audit.findings import Findings, find, rows_of, search_texts
from fastbert.dataset_work.audit.options import AuditOptions
from fastbert.dataset_work.audit.page import Report, gain_text, quality
from fastbert.dataset_work.audit.train import AuditSetup, FoldScores, fold_folder, prepare_audit, train_fold
from fastbert.errors import plural
from fastbert.files import atomic_file, locked_folder
from fastbert.finetuning.job_folder import check_other_files, open_job_folder
from fastbert.finetuning.setup import fingerprint_of_weights, identity
from fastbert.outputs import check_output_folder
from fastbert.records import json_text, write_sealed
from fastbert.streams import echo
from fastbert.training.interrupts import Interrupts

LINES, FIGURES = "audit.jsonl", "audit.json"


def audit(requested: AuditOptions) -> int:
    """Trains the folds that are not finished, and writes the report; returns the exit code.

    Raises:
        UserError: any user error, before training starts if possible.
    """
    out = Path(requested.out)
    check_output_folder(out)
    check_other_files(out, "audit")
    setup = prepare_audit(requested)
    for warning in setup.warnings:
        echo(warning)
    trainings = requested.folds * len(requested.fractions())
    echo(f"{setup.pool.task.name}: {len(setup.pool):,} examples, {plural(trainings, 'training')}")
    texts = search_texts(setup.pool, requested)
    with locked_folder(out), Interrupts() as interrupts:
        open_job_folder(out, "audit", setup.options, describe_audit(setup), setup.pretrained.source)
        folds: dict[float, list[FoldScores]] = {}
        for fraction in requested.fractions():
            folds[fraction] = []
            for fold in range(requested.folds):
                found = train_fold(setup, fold_folder(out, fraction, fold), fold, fraction, interrupts)
                if found is None:
                    echo(f"stopped; the same command continues with {fold_folder(out, fraction, fold)}")
                    return interrupts.exit_code
                folds[fraction].append(found)
        findings = find(setup.pool, folds, texts, requested.seed)
        write_results(out, setup, findings)
    print("\n".join(closing_lines(setup, findings, out)), flush=True)
    return 0


def write_results(out: Path, setup: AuditSetup, findings: Findings) -> None:
    """Writes audit.jsonl, audit.json and the report."""
    with atomic_file(out / LINES, "w") as file:
        for row in rows_of(setup.pool, setup.truncated, findings):
            file.write(json_text(row, ensure_ascii=False) + "\n")
    write_sealed(out / FIGURES, figures_of(setup, findings))
    Report(setup, findings, out).write()


def figures_of(setup: AuditSetup, findings: Findings) -> dict[str, Any]:
    """The content of audit.json."""
    pool, names = setup.pool, setup.options.annotator_names()
    agreement = {}
    if findings.annotations is not None:
        pairs = pairs_of(names, findings.annotations)
        agreement = {
            "cohen_kappa": {f"{a}, {b}": kappa for a, b, _, _, kappa in pairs},
            "fleiss_kappa": fleiss_kappa(findings.annotations, len(pool.task.kind.labels)),
            "disagreements": len(disagreements(findings.annotations)),
        }
    labels = pool.labels
    near = None if findings.near is None else [(pair.first, pair.second) for pair in findings.near]
    return {
        "task": pool.task.name,
        "model": setup.options.model,
        "examples": {split: pool.splits.count(split) for split in dict.fromkeys(pool.splits)},
        "metrics": pool.task.measure(findings.scores, labels),
        "likely_wrong": int(findings.wrong.sum()),
        "copies": len(findings.copies),
        "copies_with_different_labels": len(with_different_labels(findings.copies, labels)),
        "near_pairs": None if near is None else len(near),
        "near_pairs_with_different_labels": None if near is None else len(with_different_labels(near, labels)),
        "truncated": int(setup.truncated.sum()),
        **({} if findings.overlap is None else {"in_pretraining_text": int(findings.overlap.found.sum())}),
        **agreement,
        "learning_curve": None if findings.curve is None else asdict(findings.curve),
        "flips": None if findings.flips is None else asdict(findings.flips),
    }


def closing_lines(setup: AuditSetup, findings: Findings, out: Path) -> list[str]:
    """Lines for standard output."""
    pool = setup.pool
    wrong = int(findings.wrong.sum())
    lines = [
        f"{pool.task.name}: {len(pool):,} examples, {setup.options.folds} folds. {quality(setup, findings)}",
        f"  {wrong:,} labels are likely wrong ({wrong / len(pool):.1%})",
    ]
    different = len(with_different_labels(findings.copies, pool.labels))
    near = "" if findings.near is None else f", {len(findings.near):,} pairs of near duplicates"
    lines.append(f"  {len(findings.copies):,} texts with copies, {different:,} of them with different labels{near}")
    if findings.curve is not None:
        lines.append(f"  {gain_text(setup, findings.curve)}")
    if (flips := findings.flips) is not None:
        lines.append(
            f"  {flips.count:,} flipped labels: precision at {flips.count:,} is {flips.out_of_fold:.3f}, by in-sample "
            f"loss {flips.in_sample:.3f}, at random {flips.random:.3f}"
        )
    return [*lines, *(f"  {out / name}" for name in (LINES, "report.html"))]


def describe_audit(setup: AuditSetup) -> dict[str, Any]:
    """Everything that the scores of a fold depend on, by name."""
    leaves = configuration.leaves(setup.options, active=True)
    resolved = {name: getattr(setup.tuning, name) for name in ("epochs", "learning_rate", "max_length")}
    kind = setup.pool.task.kind
    rows = zip(setup.pool.splits, setup.pool.examples, strict=True)
    return {
        **{leaf.name: leaf.value for leaf in leaves if leaf.role == "science"},
        **resolved,
        "kind": kind.name,
        "labels": list(kind.labels),
        "model": fingerprint_of_weights(setup.pretrained),
        "tokenizer": setup.vocabulary.fingerprint[:8],
        "data": configuration.digest({"examples": [[split, *identity(example)] for split, example in rows]}),
    }
