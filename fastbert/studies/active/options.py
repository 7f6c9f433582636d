"""Options of `fastbert active`: a YAML file with pool, rounds and learners, read strictly, and flags for where and how
to run."""

from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastbert.config import from_dict
from fastbert.dataset_work.selection.options import QUERIES
from fastbert.downloads import FROM_HUB
from fastbert.errors import OptionError, UserError, choose
from fastbert.finetuning.continual.options import METHODS, ReplayOptions
from fastbert.finetuning.custom import CustomTaskOptions, check_custom_file
from fastbert.finetuning.glue import check_glue_folder
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.tasks import check_glue_options, check_task, is_glue
from fastbert.hub.folders import check_model_folder
from fastbert.inheritance import read_yaml
from fastbert.inputs import check_folder
from fastbert.ranges import Count, problem_of, text_problem
from fastbert.studies.engine.options import EngineOptions
from fastbert.studies.shared.grid import (
    check_keys,
    format_option,
    prefixed,
    read_count,
    read_mapping,
    read_seeds,
    refuse_duplicates,
    refuse_too_many,
)

OF_A_ROUND = (
    *("epochs", "batch_size", "max_length", "learning_rate", "layer_decay", "weight_decay", "beta2", "eps"),
    *("clip_norm", "schedule", "dropout", "attention_dropout", "log_every", "machine", "glue_subset"),
)
"""Options of `fastbert finetune` that the training of a round has."""


@dataclass(frozen=True)
class ActiveOptions(EngineOptions):
    """Compare ways to label and to train in rounds, with known labels: `fastbert active configs/active/x.yaml
    [options]`.

    The YAML file has model, task, pool (number of texts of the training split), rounds (numbers of labels after each
    round) and learners: mappings with a method (anew, warm, er, mir, der, sd, sds2), a query, and optionally a name,
    seeds and options of the replay (replay, alpha, beta, candidates, entropy_weight, width). It may have seeds (their
    number, or a list), threads (of each job; 1), under finetune options of `fastbert finetune` such as epochs, and the
    flags below. The others are compared with the first learner. The same command resumes a stopped study, and runs
    failed jobs again; more rounds continue from those that are finished.
    """

    rounds_from: str | None = None
    """Folder with the labels that people wrote between rounds: files such as round-2.jsonl, in the form that `fastbert
    select` writes and with a label in each row. The training split of the task is the first round, each file, in the
    order of the numbers in their names, a further one. The YAML file then has no pool, rounds and queries."""


@dataclass(frozen=True)
class Learner:
    """A method of training with a query."""

    name: str
    method: str
    query: str | None
    """None if people choose the texts."""
    seeds: tuple[int, ...]
    replay: ReplayOptions


@dataclass(frozen=True)
class ActiveStudy:
    """Content of a YAML file."""

    path: str
    model: str = field(metadata=FROM_HUB)
    task: str
    pool: int | None
    """Number of texts of the training split; None for all."""
    rounds: tuple[int, ...]
    """Number of labels after each round; empty if people label."""
    learners: tuple[Learner, ...]
    """The first one is the baseline."""
    threads: int
    finetune: dict[str, Any] = field(default_factory=dict)
    """Options of the trainings."""

    def options(self, glue_dir: str | None) -> FinetuneOptions:
        """Options of a training, without a seed."""
        values = {**self.finetune, "model": self.model, "task": self.task, "glue_dir": glue_dir, "seeds": 1}
        if not is_glue(self.task):
            values |= {"glue_dir": None, "glue_subset": False}
        values["machine"] = {**values.get("machine", {}), "threads": self.threads}
        return from_dict(FinetuneOptions, values, f"{self.path}: finetune")

    def check_inputs(self, glue_dir: str | None) -> None:
        """Checks, before torch is imported, that model and task exist.

        Raises:
            UserError: one of them does not.
        """
        with prefixed(f"{self.path}: model"):
            check_model_folder(self.model)
        with prefixed(f"{self.path}: task"):
            check_task(self.task, CustomTaskOptions())
            check_glue_options([self.task], None, bool(self.finetune.get("glue_subset")), dashes="")
        check_glue_folder(glue_dir)
        check_glue_options([self.task], glue_dir, False)

    def check_rounds(self, folder: str | None) -> None:
        """Checks that rounds come either from queries or from `folder`.

        Raises:
            UserError: they come from neither or both, or the folder has no files.
        """
        if folder is not None:
            given = [name for name in ("pool", "rounds") if getattr(self, name)]
            given += [f"the query of {learner.name}" for learner in self.learners if learner.query is not None]
            if given:
                raise UserError(
                    f"{self.path}: with --rounds-from people choose the texts: leave out {', '.join(given)}"
                )
            for path in round_files(folder):
                check_custom_file(path, None)
            return
        if not self.rounds:
            raise UserError(
                f"{self.path}: rounds is missing: the numbers of labels after each round, such as [100, 200, 300]; or "
                "give --rounds-from, a folder with labels that people wrote"
            )
        for learner in self.learners:
            if learner.query is None:
                raise UserError(f"{self.path}: learners: {learner.name} has no query; give one of {', '.join(QUERIES)}")


def round_files(folder: str | Path) -> list[Path]:
    """The files of rounds in a folder, in the order of the numbers in their names.

    Raises:
        UserError: there is no such folder or no file in it, or the order of two files is not clear.
    """
    check_folder(str(folder))
    found = sorted(path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith("."))
    if not found:
        raise UserError(f"{folder} holds no files of rounds; write the labels of round 2 to {folder}/round-2.jsonl")
    numbers: dict[int, Path] = {}
    for path in found:
        digits = "".join(c if c.isascii() and c.isdigit() else " " for c in path.name.partition(".")[0]).split()
        if not digits:
            raise UserError(f"{path} has no number in its name; name the files round-2.jsonl, round-3.jsonl, ...")
        if (other := numbers.setdefault(int(digits[-1]), path)) is not path:
            raise UserError(f"{other} and {path} have the same number; rename one of them")
    return [numbers[number] for number in sorted(numbers)]


def load_active(path: str | Path) -> tuple[ActiveStudy, ActiveOptions]:
    """Reads a YAML file: the study, and the values of flags that the file sets.

    Raises:
        UserError: states the file, the key, and the expected value.
    """
    values, where = read_yaml(path)
    values = read_mapping(values, where, "model, task, pool, rounds and learners")
    flags = {f.name for f in fields(ActiveOptions)}
    known = {"model", "task", "pool", "rounds", "learners", "seeds", "threads", "finetune", *flags}
    check_keys(values, known, where, "finetune", {f.name for f in fields(FinetuneOptions)}, {})
    for name in ("model", "task", "learners"):
        if values.get(name) is None:
            raise UserError(f"{where}: {name} is missing")
    for name in ("model", "task"):
        if not isinstance(values[name], str):
            raise UserError(f"{where}: {name} must be text, found {format_option(values[name])}")
    options = from_dict(ActiveOptions, {key: value for key, value in values.items() if key in flags}, where)
    finetune = read_training(values.get("finetune", {}), f"{where}: finetune")
    seeds = read_seeds(values.get("seeds", 1), where)
    if not isinstance(values["learners"], list) or not values["learners"]:
        raise UserError(f"{where}: learners must be a list, found {format_option(values['learners'])}")
    learners = tuple(read_learner(entry, seeds, f"{where}: learners") for entry in values["learners"])
    refuse_duplicates([learner.name for learner in learners], f"{where}: learners", "; give one of them another name")
    study = ActiveStudy(
        path=str(path),
        model=values["model"],
        task=values["task"],
        pool=read_pool_size(values.get("pool"), where),
        rounds=read_rounds(values.get("rounds"), where),
        learners=learners,
        threads=read_count(values, "threads", where, Count),
        finetune=finetune,
    )
    if study.pool is not None and study.rounds and study.rounds[-1] > study.pool:
        raise UserError(
            f"{where}: the last round has {study.rounds[-1]:,} labels, but the pool only {study.pool:,} texts; lower "
            "rounds or raise pool"
        )
    refuse_too_many(sum(len(learner.seeds) for learner in learners) * (len(study.rounds) + 1), where)
    return study, options


def read_training(values: Any, where: str) -> dict[str, Any]:
    """Options of the trainings."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of options of fastbert finetune, found {format_option(values)}")
    known = {f.name for f in fields(FinetuneOptions)}
    for key in values:
        if key in known and key not in OF_A_ROUND:
            raise UserError(f"{where}: {key} cannot be given here, where each round is a training; leave it out")
    if isinstance(values.get("machine"), dict) and "threads" in values["machine"]:
        raise UserError(f"{where}: machine: threads cannot be given here; give threads next to task, for all jobs")
    from_dict(FinetuneOptions, values, where)
    return values


def read_pool_size(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int or problem_of(value, Count):
        raise UserError(
            f"{where}: pool must be the number of texts to choose from, 1 or more, found {format_option(value)}"
        )
    return value


def read_rounds(values: Any, where: str) -> tuple[int, ...]:
    """Numbers of labels after each round."""
    if values is None:
        return ()
    if not isinstance(values, list) or not values or any(type(value) is not int for value in values):
        raise UserError(
            f"{where}: rounds must be a list with the number of labels after each round, such as [100, 200, 300], "
            f"found {format_option(values)}"
        )
    for value in values:
        if problem := problem_of(value, Count):
            raise UserError(f"{where}: rounds: each {problem}")
    if any(after <= before for before, after in pairwise(values)):
        raise UserError(f"{where}: rounds must be ascending numbers, found {format_option(values)}")
    return tuple(values)


def read_learner(entry: Any, seeds: tuple[int, ...], where: str) -> Learner:
    """An entry of learners."""
    if not isinstance(entry, dict):
        raise UserError(
            f"{where}: expected a mapping such as {{method: sd, query: entropy}}, found {format_option(entry)}"
        )
    values = {str(key).replace("-", "_"): value for key, value in entry.items()}
    options = {f.name for f in fields(ReplayOptions)}
    check_keys(values, {"method", "query", "name", "seeds", *options}, where, "", set(), {})
    for name in ("method", "query", "name"):
        if not isinstance(values.get(name, ""), str):
            raise UserError(f"{where}: {name} must be text, found {format_option(values[name])}")
        if problem := text_problem(values.get(name, name)):
            raise UserError(f"{where}: {name} {problem}")
    if "method" not in values:
        raise UserError(f"{where}: {format_option(entry)} has no method; give one of {', '.join(METHODS)}")
    with prefixed(where):
        method = choose("method", values["method"], METHODS)
        query = choose("query", values["query"], QUERIES) if "query" in values else None
    name = values.get("name") or f"{method} {query}" if query else values.get("name") or method
    where = f"{where}: {name}"
    given = {key: value for key, value in values.items() if key in options}
    replay = from_dict(ReplayOptions, given, where)
    for key in given:
        if not METHODS[method].continual:
            raise UserError(f"{where}: the method {method} has no replay memory; leave {key} out")
        if key not in METHODS[method].uses:
            uses = ", ".join(METHODS[method].uses)
            raise UserError(f"{where}: {key} has no effect with the method {method}, which uses {uses}; leave it out")
    try:
        replay.check(method)
    except OptionError as error:
        raise UserError(f"{where}: {error}") from None
    its = read_seeds(values["seeds"], where) if "seeds" in values else seeds
    return Learner(name, method, query, its, replay)
