"""Estimates of the time and the disk space of a pipeline's jobs, from finished jobs and from short measurements.

A sample of each text is prepared, a few steps of each pretraining are timed on it, and the speed of each encoder gives
the rest.
"""

import contextlib
import heapq
import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.replay import ReplayOptions
from fastbert.data.sources import open_source
from fastbert.data.sources.source import text_bytes
from fastbert.data.stages import BatchPlan
from fastbert.errors import UserError
from fastbert.model.encoder import Encoder
from fastbert.model.flops import encoder_flops, encoder_parameters
from fastbert.model.options import NoteDictionaryOptions
from fastbert.pretraining.budget import checkpoint_size, resolve_steps, time_training
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import prepare_setup
from fastbert.progress import progress
from fastbert.streams import mute
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.store import ResultStore
from fastbert.studies.pipelines.graph import COMMAND, PREPARE, Graph
from fastbert.studies.pipelines.planned import PlannedModel
from fastbert.studies.pipelines.tunings import ENSEMBLE, TOGETHER
from fastbert.studies.shared.evaluate_jobs import EVALUATE
from fastbert.studies.shared.finetune_jobs import FINETUNE
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN
from fastbert.training.timing import undisturbed

SAMPLE, SAMPLE_WORDS = 10**6, 8192  # bytes of text; size of its tokenizer where that of the text is unknown
STEP_SECONDS, MOST_STEPS = 2.0, 30  # limits of the timing of a pretraining
SHAPE = (8, 64)  # sequences and tokens of a batch with which an encoder is timed
START = 1.0  # seconds of a job apart from its steps, about


@dataclass
class Estimate:
    """Expected seconds and bytes of jobs that are not done, by id. A job that cannot be estimated is missing."""

    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)

    def wall(self, jobs: Sequence[Job], workers: int) -> float:
        """Seconds until the last of `jobs` ends, if `workers` of them run at a time."""
        ends: dict[str, float] = {}
        free = [0.0] * workers
        heapq.heapify(free)
        for job in jobs:  # in the order in which they are started
            ready = max((ends.get(parent, 0.0) for parent in job.after), default=0.0)
            ends[job.id] = max(heapq.heappop(free), ready) + self.seconds.get(job.id, 0.0)
            heapq.heappush(free, ends[job.id])
        return max(ends.values(), default=0.0)


def estimated(graph: Graph, store: ResultStore, jobs: Sequence[Job]) -> Estimate:
    """Estimates the jobs among `jobs` that are not done."""
    left = [job for job in jobs if not store.is_done(job)]
    found = Estimate()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        measurements = Measurements(graph, store, Path(folder))
        with progress("measuring", len(left), "jobs") as shown:
            mute()  # messages about samples
            try:
                for job in left:
                    with contextlib.suppress(UserError):  # the job itself reports it, when it runs
                        measurements.estimate(job, found)
                    shown.update(shown.done + 1)
            finally:
                mute(False)
    return found


class Measurements:
    """Short measurements, each made once.

    Args:
        folder: folder for samples.
    """

    def __init__(self, graph: Graph, store: ResultStore, folder: Path) -> None:
        self.graph, self.store, self.folder = graph, store, folder
        self._before: dict[tuple[object, ...], list[float]] = {}
        for job in graph.jobs:
            if store.is_done(job):
                self._before.setdefault(_alike(job), []).append(store.rows[job.id]["seconds"])
        self._samples: dict[str, tuple[Path, float, float, float]] = {}
        self._pretrainings: dict[str, tuple[float, float]] = {}
        self._speeds: dict[str, float] = {}

    def estimate(self, job: Job, found: Estimate) -> None:
        """Adds the seconds and bytes of a job."""
        measured = {
            PREPARE: self._prepare,
            PRETRAIN: self._pretrain,
            BRANCH: self._pretrain,
            FINETUNE: self._finetune,
            TOGETHER: self._finetune,
            EVALUATE: self._evaluate,
        }
        if job.kind == ENSEMBLE:
            found.seconds[job.id], found.bytes[job.id] = START / 10, 0.0
        elif job.kind != COMMAND:
            found.seconds[job.id], found.bytes[job.id] = measured[job.kind](job)
        if alike := self._before.get(_alike(job)):
            found.seconds[job.id] = sum(alike) / len(alike)

    def _prepare(self, job: Job) -> tuple[float, float]:
        _, first, seconds, scale = self.sample(job.options)
        first = seconds if job.options.get("tokenizer") else first  # that of the sample is not trained again
        size = sum(path.stat().st_size for path in self._samples[_key(job.options)][0].rglob("*") if path.is_file())
        return max(0.0, first - seconds) + seconds * scale, size * scale

    def sample(self, options: Mapping[str, object]) -> tuple[Path, float, float, float]:
        """The prepared folder of a sample of a text, the seconds with and without training a tokenizer, and the ratio
        of the whole text to the sample."""
        key = _key(options)
        if key not in self._samples:
            folder = self.folder / f"{len(self._samples)}"
            folder.mkdir()
            whole = PrepareOptions(**{**options, "out": str(folder), "tokenizer": None})
            if options.get("tokenizer"):
                whole = replace(whole, vocab_size=self.graph.vocabularies.get(options["tokenizer"], SAMPLE_WORDS))
            source = open_source(whole.source, whole.column, whole.weights, streamed=True)
            size = 0
            with open(folder / "sample.txt", "w", encoding="utf-8") as file:
                for text in source.documents():
                    file.write(f"{text.strip()}\n\n")
                    size += text_bytes(text)
                    if size >= SAMPLE:
                        break
            scale = source.size / source.position if source.size and source.position else 1.0
            part = replace(
                whole,
                source=str(folder / "sample.txt"),
                column="text",
                weights=None,
                streamed=False,
                validation_fraction=0.3,
                out=str(folder / "data"),
            )
            first = _seconds(part)
            second = _seconds(replace(part, out=str(folder / "again"), tokenizer=part.out))
            self._samples[key] = folder / "data", first, second, scale
        return self._samples[key]

    def _pretrain(self, job: Job) -> tuple[float, float]:
        model = self.graph.models[job.model]
        name = model.entry.branch or job.model
        if name not in self._pretrainings:
            self._pretrainings[name] = self._time_steps(self.graph.models[name])
        rate, size = self._pretrainings[name]
        return START + job.cost / rate, size

    def _time_steps(self, model: PlannedModel) -> tuple[float, float]:
        """FLOPs per second of a pretraining, of those in the cost of its job, and the bytes that it writes."""
        options = without_inputs(model.options, str(self._data_of(model)))
        setup = prepare_setup(options)
        options = resolve_steps(setup)
        objective = setup.objective()
        costs = {}
        for shape in setup.shapes():
            costs[shape] = time_training(setup, objective, STEP_SECONDS, BatchPlan.constant(*shape), MOST_STEPS).seconds
        seconds = replace(setup, options=options).plan().total(lambda *shape: costs[shape], 0, options.steps)
        flops = 3.0 * encoder_flops(model.config, options.batch_size, options.length) * options.steps
        copies = options.keep_checkpoints + len(options.marked_steps(options.steps)) + 1
        return flops / seconds, copies * checkpoint_size(objective) + 4.0 * encoder_parameters(model.config)

    def _data_of(self, model: PlannedModel) -> Path:
        """Prepared data for timing a pretraining: that of the pipeline, or a sample with a tokenizer of its own."""
        if (Path(model.data.path) / "dataset.json").is_file():
            return Path(model.data.path)
        job = next(job for job in self.graph.jobs if job.id == model.data.job)
        return self.sample(job.options)[0]

    def speed(self, model: PlannedModel) -> float:
        """FLOPs per second of the forward and backward pass of an encoder."""
        name = model.entry.name
        if name not in self._speeds:
            config = replace(model.config, vocab_size=min(model.config.vocab_size, 1000))
            encoder = Encoder(config)
            shape = SHAPE[0], min(SHAPE[1], config.max_positions)
            tokens = torch.zeros(shape, dtype=torch.int64)
            times = []
            for _ in range(4):
                before = time.perf_counter()
                encoder(tokens).float().sum().backward()
                times.append(time.perf_counter() - before)
            self._speeds[name] = 3.0 * encoder_flops(config, *shape) / undisturbed(times)
        return self._speeds[name]

    def _finetune(self, job: Job) -> tuple[float, float]:
        model = self.graph.models[job.model]
        saved = job.options["save_model"] and self.graph.options.keep != "none"
        return START + job.cost / self.speed(model), 4.0 * encoder_parameters(model.config) * saved

    def _evaluate(self, job: Job) -> tuple[float, float]:
        return START + job.cost / self.speed(self.graph.models[job.model]), 0.0


def without_inputs(options: PretrainOptions, data: str) -> PretrainOptions:
    """Options for timing steps on `data`, without what does not exist yet."""
    defaults = PretrainOptions()
    return replace(
        options,
        data=data,
        tokenizer=None,
        init_from=None,
        optimizer=replace(options.optimizer, keep=defaults.optimizer.keep),
        replay=ReplayOptions(),
        eval_data=None,
        best_by="new",
        notes=NoteDictionaryOptions(),
    )


def _seconds(options: PrepareOptions) -> float:
    before = time.perf_counter()
    prepare(options, io.StringIO())
    return time.perf_counter() - before


def _key(options: Mapping[str, object]) -> str:
    return repr(sorted((name, value) for name, value in options.items() if name != "tokenizer"))


def _alike(job: Job) -> tuple[object, ...]:
    """Values that jobs which differ by their seed alone have in common."""
    setting = {name: value for name, value in job.setting.items() if name != "trial"}
    return job.kind, job.model, job.task, *setting.items()
