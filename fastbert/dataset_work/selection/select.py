"""`fastbert select`: the texts of a pool to label next."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.dataset_work.selection.options import (
    FACILITY_LOCATION,
    K_CENTRE,
    RANDOM,
    UNCERTAINTY,
    SelectOptions,
)
from fastbert.dataset_work.selection.output import write_rows
from fastbert.dataset_work.selection.pool import REASON, SCORE, Chosen, Pool, random_rows, read_pool
from fastbert.errors import UserError, plural
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.tasks import Task, open_task
from fastbert.outputs import refuse_input

if TYPE_CHECKING:
    from fastbert.dataset_work.selection.scoring import Scoring


def select(options: SelectOptions) -> dict[str, Any]:
    """Selects texts, writes their rows, and prints how many were selected from what; returns the numbers.

    Raises:
        UserError: any user error, before anything is written.
    """
    task = open_task(options.task, glue_dir=options.glue_dir, glue_subset=options.glue_subset)
    refuse_input(options.out, [options.task, *task.splits.values()])
    check_kind(task.kind, options)
    pool = read_pool(options.pool, task, options.task, options.limit, options.seed)
    check_count(options, pool)
    scoring = open_scoring(options, task)
    if options.query == RANDOM:
        chosen = random_rows(pool, options.count, options.seed)
        if scoring is not None:
            scoring.compare(pool)
    elif options.query in UNCERTAINTY:
        chosen = scoring.most_uncertain(pool, options.query, options.count)
    elif options.query == K_CENTRE:
        chosen = scoring.k_centre(pool, options.count, options.seed)
    else:
        chosen = scoring.facility_location(pool, options.count, options.entropy_weight)
    cells = pool.cells({one.index for one in chosen})
    write_rows(options.out, [cells[one.index] | {SCORE: one.score, REASON: one.reason} for one in chosen])
    print("\n".join(report(options, pool, chosen, scoring)))
    summary = {"rows": len(pool.keys), "labelled": pool.labelled, "repeated": pool.repeated}
    summary |= {"remaining": pool.remaining, "used": len(pool), "selected": len(chosen)}
    if scoring is not None:
        summary |= {"truncated": scoring.truncated}
        summary |= {} if scoring.agreement is None else {"kappa": scoring.agreement.kappa()}
    return summary


def open_scoring(options: SelectOptions, task: Task) -> "Scoring | None":
    """Loads the models; None if none is needed."""
    if options.query == RANDOM and options.previous is None:
        return None
    from fastbert.dataset_work.selection.scoring import Scoring  # imports torch, which random does not need

    return Scoring(options, task)


def check_kind(kind: TaskKind, options: SelectOptions) -> None:
    """Raises a UserError if a query, or --previous, needs probabilities that the kind does not have."""
    if kind.distributions(np.zeros((0, *kind.score_shape()))) is not None:
        return
    if options.query in (*UNCERTAINTY, FACILITY_LOCATION):
        raise UserError(
            f"--query {options.query} needs probabilities: the kind {kind.name} has no scores for it; give "
            f"--query {K_CENTRE} or {RANDOM}"
        )
    if options.previous is not None:
        raise UserError(f"--previous compares predicted labels, and the kind {kind.name} has none; leave it out")


def check_count(options: SelectOptions, pool: Pool) -> None:
    """Raises a UserError if fewer texts than --count remain."""
    if options.count > pool.remaining:
        remain = f"{plural(pool.remaining, 'text')} of {options.pool} remain{'s' * (pool.remaining == 1)}"
        excluded = f" ({pool.excluded()})" if pool.excluded() else ""
        raise UserError(
            f"--count is {options.count:,}, and {remain}{excluded}; lower --count, or add texts to the pool"
        )
    if options.count > len(pool):
        raise UserError(
            f"--count is {options.count:,}, and --query {options.query} uses a sample of {len(pool):,} texts; give "
            f"--pool-size {options.count:,} or more"
        )


def report(options: SelectOptions, pool: Pool, chosen: list[Chosen], scoring: "Scoring | None") -> list[str]:
    """Lines for the user."""
    used = f", a sample of {len(pool):,} was used" if len(pool) < pool.remaining else ""
    parts = [plural(len(pool.keys), "row"), *([pool.excluded()] if pool.excluded() else [])]
    lines = [
        f"{options.out}: {plural(len(chosen), 'text')} selected by {options.query}, scores {chosen[0].score:.4g} to "
        f"{chosen[-1].score:.4g}",
        f"  {options.pool}: {', '.join(parts)}; {pool.remaining:,} remain{used}",
    ]
    if scoring is not None:
        lines += [f"  {line}" for line in scoring.messages()]
    return [*lines, "  next: label these rows, add them to train, and fine-tune again"]
