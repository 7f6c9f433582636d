"""Plan of a study: model and task are opened and checked once, before the first job starts.

The jobs of a learner with one seed are a chain: each round continues from the files of the one before. A round's
identity has nothing of later rounds, so a study with more rounds continues from those that are finished.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastbert.config import digest, to_dict
from fastbert.errors import UserError, plural
from fastbert.finetuning.continual.options import METHODS
from fastbert.finetuning.options import FinetuneOptions, science
from fastbert.streams import echo
from fastbert.studies.active.acquire import check_query
from fastbert.studies.active.options import ActiveOptions, ActiveStudy, Learner, round_files
from fastbert.studies.active.pool import Texts, check_schedules, open_texts
from fastbert.studies.active.round_job import FINAL, ROUND
from fastbert.studies.engine.jobs import Job
from fastbert.studies.shared.grid import prefixed

RUNNER = "fastbert.studies.active.round_job:round_job"


@dataclass(frozen=True)
class ActivePlan:
    """The jobs of a study."""

    study: ActiveStudy
    texts: Texts
    rounds: tuple[int, ...]
    """Number of labels after each round."""
    jobs: list[Job]
    """A job for each learner, seed and round, and a final one, in this order."""


def plan_active(study: ActiveStudy, options: ActiveOptions) -> ActivePlan:
    """Plans all jobs.

    Raises:
        UserError: model, task, pool, rounds or a query are invalid.
    """
    study.check_rounds(options.rounds_from)
    files = [] if options.rounds_from is None else [path.resolve() for path in round_files(options.rounds_from)]
    finetune = study.options(options.glue_dir)
    opened = finetune
    if options.backend == "ray":  # this machine need not have the device of the jobs
        opened = replace(finetune, machine=replace(finetune.machine, device="cpu", apex=False))
    with prefixed(study.path):
        texts = open_texts(opened, study.pool, files)
        rounds = texts.people or study.rounds
        task = texts.setup.task
        if rounds[-1] > len(texts.examples):
            raise UserError(
                f"the last round has {rounds[-1]:,} labels, but the pool only "
                f"{plural(len(texts.examples), 'different text')}; lower rounds"
            )
        for learner in study.learners:
            if learner.query is not None:
                check_query(learner.query, task.kind, task.name)
            if METHODS[learner.method].loss == "sd" and task.kind.name != "classes":
                raise UserError(f"the method {learner.method} needs classes, and {task.name} predicts {task.kind.plural}")
        check_schedules(texts.setup.options, trained_counts(study.learners, rounds))
    for warning in texts.setup.warnings:
        echo(warning)
    jobs = [
        job
        for learner in study.learners
        for seed in learner.seeds
        for job in chain(study, texts, rounds, learner, seed, finetune, files)
    ]
    return ActivePlan(study, texts, rounds, jobs)


def trained_counts(learners: Sequence[Learner], rounds: Sequence[int]) -> list[int]:
    """Numbers of examples of an epoch in the rounds of the learners and in their final trainings."""
    new = [after - before for before, after in zip((0, *rounds), rounds, strict=False)]
    continual = any(METHODS[learner.method].continual for learner in learners)
    return sorted({*rounds, *(new if continual else [])})


def chain(
    study: ActiveStudy,
    texts: Texts,
    rounds: Sequence[int],
    learner: Learner,
    seed: int,
    finetune: FinetuneOptions,
    files: Sequence[Path],
) -> Iterator[Job]:
    """The rounds of a learner with one seed and, for methods that do not train anew, the final training."""
    setup = texts.setup
    resolved = setup.options
    replay = learner.replay.used(learner.method, resolved.batch_size)
    described = texts.described() if not files else {}
    weights = setup.pretrained.weights
    parameters = sum(weights[key].numel() for key in weights if key.startswith("encoder.blocks."))
    after = None
    for number in range(1, len(rounds) + 1):
        sizes = list(rounds[:number])
        count = sizes[-1] if files else None
        identity = {
            **(described or texts.described(count)),
            **{"task": setup.task.name, "kind": setup.task.kind.name, "labels": list(setup.task.kind.labels)},
            **{"metrics": list(setup.task.metrics), "seed": seed, "rounds": sizes},
            **{"method": learner.method, "query": learner.query, "replay": replay},
            **{"threads": study.threads, "precision": finetune.machine.precision, "options": science(resolved)},
        }
        options = {
            **{"finetune": without_folder(finetune), "pool": study.pool, "texts": count, "rounds": sizes},
            **{"method": learner.method, "query": learner.query, "replay": replay},
            "files": [str(path) for path in files[: number - 1]],
        }
        new = sizes[-1] - (sizes[-2] if number > 1 else 0)
        examples = 2 * new if METHODS[learner.method].continual else sizes[-1]
        common = {
            **{"model": learner.name, "task": setup.task.name, "seed": seed, "setting": {"labels": sizes[-1]}},
            **{"options": options, "folder": str(Path.cwd()), "runner": RUNNER, "device": finetune.machine.device},
        }
        work = parameters * resolved.epochs
        identity = {**identity, "kind of job": ROUND}
        job = Job(
            id=digest(identity), identity=identity, kind=ROUND, after=after, cost=float(work * examples), **common
        )
        yield job
        after = job.id
    if METHODS[learner.method].from_last:
        identity = {**identity, "kind of job": FINAL}
        cost = float(work * rounds[-1])
        yield Job(id=digest(identity), identity=identity, kind=FINAL, after=after, cost=cost, **common)


def without_folder(options: FinetuneOptions) -> dict[str, Any]:
    """Options of a training for its job."""
    values = to_dict(options)
    del values["out"]
    return values
