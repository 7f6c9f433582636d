"""Plan of a study: model and task are opened and checked once, before the first job starts.

The jobs of a learner with one seed are a chain: each round continues from the files of the one before. A round's
identity has nothing of later rounds, so a study with more rounds continues from those that are finished.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastbert.config import digest, to_dict
from fastbert.errors import UserError, plural
from fastbert.finetuning.continual.options import METHODS
from fastbert.finetuning.loop import block_of
from fastbert.finetuning.options import FinetuneOptions, science
from fastbert.finetuning.setup import expected_memory
from fastbert.streams import echo
from fastbert.studies.active.acquire import check_query
from fastbert.studies.active.options import ActiveOptions, ActiveStudy, Learner, round_files
from fastbert.studies.active.pool import Texts, check_schedules, open_texts
from fastbert.studies.active.round_job import FINAL, ROUND
from fastbert.studies.engine.jobs import Job
from fastbert.studies.shared.grid import prefixed


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
    files = None if options.rounds_from is None else [path.resolve() for path in round_files(options.rounds_from)]
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
                raise UserError(
                    f"the method {learner.method} needs classes, and {task.name} predicts {task.kind.plural}"
                )
        check_schedules(texts.setup.options, trained_counts(study.learners, rounds))
    for warning in texts.setup.warnings:
        echo(warning)
    chains = Chains(study, texts, rounds, finetune, files)
    jobs = [job for learner in study.learners for seed in learner.seeds for job in chains.jobs(learner, seed)]
    return ActivePlan(study, texts, rounds, jobs)


def trained_counts(learners: Sequence[Learner], rounds: Sequence[int]) -> list[int]:
    """Numbers of examples of an epoch in the rounds of the learners and in their final trainings."""
    new = [after - before for before, after in zip((0, *rounds), rounds, strict=False)]
    continual = any(METHODS[learner.method].continual for learner in learners)
    return sorted({*rounds, *(new if continual else [])})


@dataclass(frozen=True)
class Chains:
    """Values that the jobs of all learners have in common."""

    study: ActiveStudy
    texts: Texts
    rounds: Sequence[int]
    finetune: FinetuneOptions
    """Options of the trainings, without defaults resolved."""
    files: Sequence[Path] | None
    """Files of the rounds after the first one, if people have labelled."""

    @cached_property
    def data(self) -> list[str]:
        """Hash of the data that each round reads."""
        if self.files is None:
            return [self.texts.fingerprint()] * len(self.rounds)
        return [self.texts.fingerprint(count) for count in self.rounds]

    def jobs(self, learner: Learner, seed: int) -> Iterator[Job]:
        """The rounds of a learner with one seed and, for methods that do not train anew, the final training."""
        job = None
        for number in range(1, len(self.rounds) + 1):
            job = self.job(learner, seed, number, ROUND, job and job.id)
            yield job
        if METHODS[learner.method].from_last:
            yield self.job(learner, seed, len(self.rounds), FINAL, job.id)

    def job(self, learner: Learner, seed: int, number: int, kind: str, after: str | None) -> Job:
        """A job of round `number`, from 1."""
        setup, sizes = self.texts.setup, list(self.rounds[:number])
        resolved, task = setup.options, setup.task
        asked = {"method": learner.method, "query": learner.query, "rounds": sizes}
        asked["replay"] = learner.replay.used(learner.method, resolved.batch_size)
        identity = {
            **{"job": kind, **asked, "seed": seed, **self.texts.encoder, "data": self.data[number - 1]},
            **{"task": task.name, "kind": task.kind.name, "labels": list(task.kind.labels)},
            **{"metrics": list(task.metrics), "options": science(resolved)},
            **{"threads": self.study.threads, "precision": self.finetune.machine.precision},
        }
        files = None if self.files is None else [str(path) for path in self.files[: number - 1]]
        texts = None if files is None else sizes[-1]
        options = {**asked, "finetune": without_folder(self.finetune), "pool": self.study.pool}
        options |= {"files": files, "texts": texts}
        weights = setup.pretrained.weights
        parameters = sum(weights[key].numel() for key in weights if block_of(key) is not None)
        new = sizes[-1] - (sizes[-2] if number > 1 else 0)
        examples = 2 * new if METHODS[learner.method].continual and kind == ROUND else sizes[-1]
        return Job(
            id=digest(identity),
            model=learner.name,
            task=task.name if kind == ROUND else f"{task.name}, trained anew",
            seed=seed,
            setting={"labels": sizes[-1]},
            identity=identity,
            options=options,
            folder=str(Path.cwd()),
            cost=float(parameters * resolved.epochs * examples),
            runner="fastbert.studies.active.round_job:round_job",
            kind=kind,
            device=self.finetune.machine.device,
            memory=expected_memory(setup),
            after=() if after is None else (after,),
        )


def without_folder(options: FinetuneOptions) -> dict[str, Any]:
    """Options of a training for its job."""
    values = to_dict(options)
    del values["out"]
    return values
