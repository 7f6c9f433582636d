"""Text of `fastbert run --dry-run`: the graph, what is done, and estimates."""

from collections.abc import Collection, Mapping, Sequence

from fastbert.errors import plural
from fastbert.finetuning.table import NOTHING
from fastbert.pretraining.budget import shown_time
from fastbert.pretraining.dry_run import shown_size
from fastbert.report.page import Table
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.store import ResultStore
from fastbert.studies.pipelines.estimate import Estimate, estimated
from fastbert.studies.pipelines.graph import Graph, in_levels
from fastbert.studies.pipelines.tunings import ENSEMBLE
from fastbert.training.checkpoints import free_space


def planned_text(graph: Graph, store: ResultStore, selected: Sequence[Job], before: Collection[str]) -> str:
    """The jobs by entry and model, and totals.

    Args:
        selected: the jobs of this call.
        before: ids of the jobs of the last call in the same folder.
    """
    rows = [
        [("  " * level) + entry, model, f"{len(jobs)}", *states(jobs, store, before)]
        for (level, entry, model), jobs in grouped(graph, selected).items()
    ]
    lines = [Table(["entry", "model", "jobs", "done", "cached", "to do"], rows).plain(), *graph.left_out]
    left = [job for job in selected if not store.is_done(job)]
    lines.append(f"{plural(len(selected), 'job')}, {len(left)} to do")
    if left:
        lines += estimated_lines(graph, estimated(graph, store, selected), left)
    return "\n".join(lines)


def estimated_lines(graph: Graph, estimate: Estimate, left: Sequence[Job]) -> list[str]:
    """Lines on the time and the disk space of the jobs that are to do."""
    workers = graph.options.workers
    unknown = [job for job in left if job.id not in estimate.seconds]
    without = f", without {plural(len(unknown), 'job')} that cannot be estimated" if unknown else ""
    wall, work = estimate.wall(left, workers), sum(estimate.seconds.values())
    size, free = sum(estimate.bytes.values()), free_space(graph.out)
    lines = [
        f"time: about {shown_time(wall)} with {plural(workers, 'worker')}, {shown_time(work)} of work{without}",
        f"disk: about {shown_size(size)}, of which --keep {graph.options.keep} removes models at the end; free "
        f"{shown_size(free)}",
    ]
    if graph.options.keep == "all" or not graph.pipeline.stages:
        lines[1] = f"disk: about {shown_size(size)}; free {shown_size(free)}"
    return lines


def grouped(graph: Graph, selected: Sequence[Job]) -> Mapping[tuple[int, str, str], list[Job]]:
    """(Level in the graph, entry, model) -> jobs. Ensembles are apart from the fine-tunings of their entry."""
    found: dict[tuple[int, str, str], list[Job]] = {}
    chosen = {job.id for job in selected}
    for level, job in in_levels(graph.jobs):
        if job.id in chosen:
            entry = graph.entries[job.id] + (" (ensembles)" if job.kind == ENSEMBLE else "")
            found.setdefault((level, entry, job.model), []).append(job)
    return found


def states(jobs: Sequence[Job], store: ResultStore, before: Collection[str]) -> list[str]:
    """Numbers of jobs that are done, that an earlier version of the file had done (cached), and that are to do."""
    done = [job for job in jobs if store.is_done(job)]
    last = sum(job.id in before for job in done)
    numbers = (last, len(done) - last, len(jobs) - len(done))
    return [str(number) if number else NOTHING for number in numbers]
