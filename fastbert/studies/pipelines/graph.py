"""The graph of a pipeline: every part of its YAML file becomes jobs, named by a hash of all that decides their result.

Paths of what earlier jobs write are known from their ids; their contents are not, so a job's identity has the ids of
the jobs that it depends on instead of hashes of weights or data.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from fastbert.config import digest, to_dict
from fastbert.data.prepare import PrepareOptions
from fastbert.data.shards import open_dataset
from fastbert.data.sources import open_source
from fastbert.errors import UserError
from fastbert.finetuning.setup import fingerprint_of_weights
from fastbert.hub.load import load_pretrained
from fastbert.model.config import EncoderConfig
from fastbert.model.flops import encoder_flops
from fastbert.pretraining.branch import branch_problem, continued
from fastbert.pretraining.budget import check_steps, steps_of
from fastbert.pretraining.note_corpus import rare_word_range
from fastbert.pretraining.options import SOURCE_ONLY, PretrainOptions, science
from fastbert.pretraining.setup import check_networks, data_fingerprint
from fastbert.studies.engine.jobs import Job, title
from fastbert.studies.engine.outcomes import RUN
from fastbert.studies.engine.store import JOBS
from fastbert.studies.pipelines.options import Command, DataEntry, EncoderEntry, RunOptions
from fastbert.studies.pipelines.pipeline import Pipeline
from fastbert.studies.pipelines.planned import Input, PlannedModel, branch_step, pretraining_memory, unscored
from fastbert.studies.pipelines.tunings import Tunings
from fastbert.studies.shared.evaluate_jobs import EVALUATIONS, PlannedEvaluation, fingerprints, plan_evaluations
from fastbert.studies.shared.grid import prefixed
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN, initial_weights, without_masked_head
from fastbert.training.hardware import resolve_device
from fastbert.training.splits import named_folders

PREPARE, COMMAND = "prepare", "command"  # the kinds of these jobs
RUNNERS = "fastbert.studies.pipelines.runners"


class Graph:
    """The jobs of a pipeline.

    Args:
        out: folder of the pipeline.

    Attributes:
        jobs: in an order in which each comes after those it depends on.
        entries: id of a job -> name of its entry in the file (pairs and pll for evaluations).
        left_out: lines on evaluations that a model cannot have.

    Raises:
        UserError: an entry is invalid.
    """

    def __init__(self, pipeline: Pipeline, options: RunOptions, out: Path) -> None:
        self.pipeline, self.options, self.out = pipeline, options, out
        self.jobs: list[Job] = []
        self.entries: dict[str, str] = {}
        self.left_out: list[str] = []
        self.warnings: list[str] = []
        self.models: dict[str, PlannedModel] = {}
        self._data: dict[str, Input] = {}
        self._planning: list[str] = []
        self.vocabularies: dict[str, int] = {}
        """Path of prepared data -> size of its vocabulary, as far as it is known."""
        for name in pipeline.data:
            with prefixed(f"{pipeline.path}: data"):
                self.data(name)
        for entry in pipeline.models.values():
            with prefixed(f"{pipeline.path}: models: {entry.name}"):
                self.models[entry.name] = self._model(entry)
        self.evaluations = plan_evaluations(pipeline.grid_of_evaluations())
        with tempfile.TemporaryDirectory() as scratch, prefixed(pipeline.path):
            for model in self.models.values():
                for evaluation in self.evaluations:
                    self._evaluate(model, evaluation)
            self.tunings = Tunings(pipeline, options, out, self.models, Path(scratch))
            for entry, job in self.tunings.jobs():
                self.add(entry, job)
            for command in pipeline.commands.values():
                self._command(command)
        self.warnings += self.tunings.warnings

    def add(self, entry: str, job: Job) -> Job:
        """Adds a job of an entry.

        Raises:
            UserError: another entry has the same job.
        """
        if job.id in self.entries:
            other = self.entries[job.id]
            raise UserError(
                f"{other} and {entry} have the same job ({title(job)}): the options in which they differ have no "
                "effect in this combination; remove one of them"
            )
        self.entries[job.id] = entry
        self.jobs.append(job)
        return job

    def folder(self, job: str) -> str:
        """Folder of the files of a job."""
        return str(self.out.resolve() / JOBS / job / RUN)

    # --- data

    def data(self, name: str) -> Input:
        """The prepared data of an entry, whose job is added."""
        if name not in self._data:
            if name in self._planning:
                circle = " -> ".join([*self._planning, name])
                raise UserError(f"tokenizers in a circle: {circle}")
            self._planning.append(name)
            self._data[name] = self._prepare(self.pipeline.data[name])
            self._planning.remove(name)
        return self._data[name]

    def _prepare(self, entry: DataEntry, tokenizer: Input | None = None) -> Input:
        given = dict(entry.options)
        named = given.get("tokenizer")
        if tokenizer is None and named in {*self.pipeline.data, *self.pipeline.models}:
            tokenizer = self._tokenizer(named)
        options = PrepareOptions(**{**given, "out": "data"})
        options = replace(options, tokenizer=None if tokenizer else options.tokenizer)
        identity = {
            "prepare": open_source(options.source, options.column, options.weights, options.streamed).identity,
            "options": options.identity(),
        }
        if tokenizer is not None:
            for name in ("vocab_size", "lowercase", "strip_accents"):
                identity["options"].pop(name, None)
            identity["options"]["tokenizer"] = tokenizer.mark
            given["tokenizer"] = tokenizer.path
        job = Job(
            id=digest(identity),
            model=entry.name,
            task=PREPARE,
            seed=None,
            setting={},
            identity=identity,
            options=given,
            folder=str(Path.cwd()),
            cost=0.0,
            runner=f"{RUNNERS}:prepare_job",
            kind=PREPARE,
            device="cpu",
            after=() if tokenizer is None else tokenizer.after,
        )
        if job.id not in self.entries:  # models without a data entry have a source in common
            self.add(entry.name, job)
        trained = None if options.tokenizer else job.id
        found = Input(self.folder(job.id), job.id, job.id, tokenizer.tokenizer if tokenizer else trained)
        if tokenizer is None:
            self.vocabularies[found.path] = options.vocab_size
        return found

    def _tokenizer(self, name: str) -> Input:
        """A folder with the tokenizer of an entry: prepared data, or an existing checkpoint."""
        if name in self.pipeline.data:
            return self.data(name)
        if name in self.models:
            return self.models[name].data
        entry = self.pipeline.models[name]
        if entry.path is not None:
            mark = fingerprints(load_pretrained(entry.path))["tokenizer"]
            return Input(entry.path, mark, tokenizer=mark)
        parent = entry.after or entry.branch
        if parent is not None:
            return self._tokenizer(parent)
        return self._input_data(entry.options, None)

    def _input_data(self, options: PretrainOptions, start: Input | None) -> Input:
        """The data of a pretraining: an entry of the file, a prepared folder, or a source to prepare.

        Args:
            start: folder with the tokenizer of the model that it starts from.
        """
        spec = options.data
        if spec in self.pipeline.data:
            return self.data(spec)
        if (Path(spec) / "dataset.json").is_file():
            dataset = open_dataset(spec)
            path = str(Path(spec).resolve())
            self.vocabularies[path] = dataset.vocab_size
            return Input(path, data_fingerprint(dataset))
        values = {name: getattr(options, name) for name in SOURCE_ONLY}
        values |= {"source": spec, "workers": options.machine.workers, **rare_word_range(options.notes)}
        defaults = {name: getattr(PrepareOptions, name, None) for name in values}
        given = {name: value for name, value in values.items() if value != defaults[name]}
        named = options.tokenizer in {*self.pipeline.data, *self.pipeline.models}
        return self._prepare(DataEntry(spec, given), None if named else start)

    # --- models

    def _model(self, entry: EncoderEntry) -> PlannedModel:
        if entry.path is not None:
            pretrained = load_pretrained(entry.path)
            identity = fingerprints(pretrained)
            return PlannedModel(
                entry,
                pretrained.config,
                None,
                {None: Input(entry.path, identity["model"])},
                identity,
                identity | {"model": fingerprint_of_weights(pretrained)},
                data=Input(entry.path, identity["tokenizer"], tokenizer=identity["tokenizer"]),
                unscored=unscored(pretrained, entry.path),
            )
        if entry.branch is not None:
            return self._branch(entry)
        options = entry.options
        check_steps(options)
        # The nodes of a cluster may have devices that this machine lacks.
        check_networks(options, resolve_device("cpu" if self.options.backend == "ray" else options.machine.device))
        parent = self.models.get(entry.after) if entry.after else None
        start = parent and parent.data
        if parent is None and options.init_from is not None:
            given = load_pretrained(options.init_from)
            options = replace(options, encoder=options.encoder.like(given.config))
            mark = fingerprints(given)["tokenizer"]
            start = Input(str(given.tokenizer), mark, tokenizer=mark)
        elif parent is not None:
            options = replace(options, encoder=options.encoder.like(parent.config))
        data = self._input_data(options, start)
        if start is not None:
            check_same_tokenizer(options.data, data, entry.after or options.init_from, start)
        config = options.encoder.resolve(self.vocabularies.get(data.path, options.vocab_size), options.length)
        checkpoints = {seed: self._pretrain(entry, options, config, seed, data, parent) for seed in entry.seeds}
        masked = without_masked_head([(entry.name, options.objective)])
        without = {"pll": masked[entry.name]} if masked else {}
        return PlannedModel(entry, config, options.objective, checkpoints, data=data, options=options, unscored=without)

    def _pretrain(
        self,
        entry: EncoderEntry,
        options: PretrainOptions,
        config: EncoderConfig,
        seed: int,
        data: Input,
        parent: PlannedModel | None,
    ) -> Input:
        options = replace(options, seed=seed)
        inputs, paths, marks = [data], {"data": data.path}, {}
        if options.replay.data is not None:
            old = self._other(options.replay.data)
            check_same_tokenizer(options.replay.data, old, options.data, data)
            inputs.append(old)
            paths["replay"] = replace(options.replay, data=old.path)
            marks["replay"] = old.mark
        if options.eval_data is not None:
            others = {name: self._other(folder) for name, folder in named_folders(options.eval_data).items()}
            for name, folder in named_folders(options.eval_data).items():
                check_same_tokenizer(folder, others[name], options.data, data)
            inputs += others.values()
            paths["eval_data"] = ",".join(f"{name}={other.path}" for name, other in others.items())
            marks["eval_data"] = {name: other.mark for name, other in others.items()}
        if parent is not None:
            first = next(iter(parent.checkpoints.values()))
            start = parent.checkpoints.get(seed, first)
            inputs.append(start)
            paths["init_from"] = start.path
            marks["initial"] = start.mark
        elif options.init_from is not None:
            marks["initial"] = initial_weights(options.init_from)
        machine = options.machine
        names = ("tokens", "eval_sequences", "milestones", "checkpoint_words", "best_by")
        identity = {
            "pretrain": science(options, data.mark),
            **{name: getattr(options, name) for name in names},
            **{"threads": machine.threads, "precision": machine.precision},
            **marks,
        }
        written = replace(options, **paths)
        steps = options.steps or options.tokens / (options.batch_size * options.length)
        job = Job(
            id=digest(identity),
            model=entry.name,
            task="pretraining",
            seed=seed,
            setting={},
            identity=identity,
            options={name: value for name, value in to_dict(written).items() if name not in ("out", "resume")},
            folder=str(Path.cwd()),
            cost=3.0 * encoder_flops(config, options.batch_size, options.length) * steps,
            runner=f"{RUNNERS}:pretrain_job",
            kind=PRETRAIN,
            device=machine.device,
            after=tuple(dict.fromkeys(one for each in inputs for one in each.after)),
            memory=pretraining_memory(options, config),
        )
        self.add(entry.name, job)
        return Input(self.folder(job.id), job.id, job.id)

    def _other(self, spec: str) -> Input:
        """Old data, or data to validate on."""
        if spec in self.pipeline.data:
            return self.data(spec)
        if (Path(spec) / "dataset.json").is_file():
            return Input(str(Path(spec).resolve()), data_fingerprint(open_dataset(spec)))
        raise UserError(f"{spec} is neither data of this file nor a prepared folder; put it under data")

    def _branch(self, entry: EncoderEntry) -> PlannedModel:
        parent = self.models[entry.branch]
        options = replace(parent.options, steps=steps_of(parent.options), tokens=None)
        step = branch_step(entry, parent, options)
        anneal, steps = entry.values.get("anneal"), entry.values.get("steps")
        if problem := branch_problem(options, step, anneal, steps):
            raise UserError(f"branch: {problem}")
        after = continued(options, step, anneal, steps)
        checkpoints = {}
        for seed in entry.seeds:
            trunk = parent.checkpoints[seed]
            machine = options.machine
            identity = {"branch": trunk.mark, "step": step, **entry.values, "threads": machine.threads}
            of_trunk = next(job for job in self.jobs if job.id == trunk.job)
            job = Job(
                id=digest(identity),
                model=entry.name,
                task="pretraining",
                seed=seed,
                setting={},
                identity=identity,
                options={"branch": f"{trunk.path}@{step}", **entry.values},
                folder=str(Path.cwd()),
                cost=of_trunk.cost * (after.steps - step) / options.steps,
                memory=of_trunk.memory,
                runner=f"{RUNNERS}:branch_job",
                kind=BRANCH,
                device=machine.device,
                after=trunk.after,
            )
            self.add(entry.name, job)
            checkpoints[seed] = Input(self.folder(job.id), job.id, job.id)
        return replace(parent, entry=entry, checkpoints=checkpoints, options=after)

    # --- evaluations and commands

    def _evaluate(self, model: PlannedModel, evaluation: PlannedEvaluation) -> None:
        name = model.entry.name
        if reason := model.unscored.get(evaluation.key):
            self.left_out.append(f"{name} is not evaluated on {EVALUATIONS[evaluation.key]}: {reason}")
            return
        for seed, checkpoint in model.checkpoints.items():
            identity = {"pretraining": checkpoint.mark} if checkpoint.job else model.identity
            job = evaluation.job(
                name, checkpoint.path, model.config, identity, seed=seed, setting={}, after=checkpoint.after
            )
            self.add(evaluation.key, replace(job, runner=f"{RUNNERS}:evaluation_job"))

    def _command(self, command: Command) -> None:
        name = command.name
        of_entry: dict[str, list[str]] = {}
        for job, entry in self.entries.items():
            of_entry.setdefault(entry, []).append(job)
        folders = {one: [self.folder(job) for job in of_entry.get(one, ())] for one in command.after}
        after = tuple(job for one in command.after for job in of_entry.get(one, ()))
        identity = {"command": command.run, "after": list(after), "threads": self.pipeline.threads}
        existing = [model for one in command.after if (model := self.models.get(one)) and model.entry.path]
        for model in existing:
            folders[model.entry.name] = [str(Path(model.entry.path).resolve())]
            identity.setdefault("models", {})[model.entry.name] = model.identity
        self.add(
            name,
            Job(
                id=digest(identity),
                model=name,
                task=COMMAND,
                seed=None,
                setting={},
                identity=identity,
                options={"run": command.run, "folders": folders, "resumes": command.resumes},
                folder=str(Path.cwd()),
                cost=0.0,
                runner=f"{RUNNERS}:command_job",
                kind=COMMAND,
                after=after,
            ),
        )

    # --- selection

    def selected(self) -> list[Job]:
        """The jobs of --only or --until, in their order; all jobs without these options.

        Raises:
            UserError: a name is not one of an entry with jobs.
        """
        names = self.options.selected
        if not names:
            return self.jobs
        known = dict.fromkeys(self.entries.values())
        for name in names:
            if name not in known:
                option = "--only" if self.options.only is not None else "--until"
                raise UserError(f"{option}: {self.pipeline.path} has no jobs of {name!r}; it has {', '.join(known)}")
        wanted = {job for job, entry in self.entries.items() if entry in names}
        if self.options.until is not None:
            wanted |= ancestors(self.jobs, wanted)
        return [job for job in self.jobs if job.id in wanted]


def check_same_tokenizer(name: str, data: Input, other: str, wanted: Input) -> None:
    """Raises a UserError if data of the pipeline has another tokenizer than a model or other data."""
    if None not in (data.tokenizer, wanted.tokenizer) and data.tokenizer != wanted.tokenizer:
        raise UserError(f"{name} and {other} have different tokenizers; under data, give {name} tokenizer: {other}")


def ancestors(jobs: Iterable[Job], of: Iterable[str]) -> set[str]:
    """Ids of all jobs on which the jobs `of` depend."""
    after = {job.id: job.after for job in jobs}
    found: set[str] = set()
    waiting = list(of)
    while waiting:
        for parent in after[waiting.pop()]:
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def in_levels(jobs: Iterable[Job]) -> Iterator[tuple[int, Job]]:
    """The jobs with the length of the longest chain of jobs before them."""
    level: dict[str, int] = {}
    for job in jobs:
        level[job.id] = 1 + max((level[one] for one in job.after if one in level), default=-1)
        yield level[job.id], job
