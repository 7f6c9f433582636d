"""Files of finished jobs that later jobs read, and that `keep` or the user may have removed."""

from pathlib import Path

from fastbert.errors import plural
from fastbert.files import remove
from fastbert.finetuning.dev_ensemble import SCORES
from fastbert.streams import echo
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.outcomes import RUN
from fastbert.studies.engine.store import JOBS, ResultStore
from fastbert.studies.pipelines.graph import PREPARE, Graph
from fastbert.studies.pipelines.tunings import ENSEMBLE, TOGETHER
from fastbert.studies.shared.finetune_jobs import FINETUNE
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN
from fastbert.training.checkpoints import checkpoint_paths


def rerun_lost(graph: Graph, store: ResultStore) -> None:
    """Removes the rows of jobs that are done, but whose files a remaining job needs and which are missing: they run
    again."""
    needed: dict[str, list[Job]] = {}
    lost = 0
    for job in reversed(graph.jobs):  # a job comes after those it depends on
        done = store.is_done(job)
        if done and not all(has_files_for(later, job, store.out) for later in needed.get(job.id, ())):
            del store.rows[job.id]
            remove(store.out / JOBS / job.id)
            done, lost = False, lost + 1
        if not done:
            for parent in job.after:
                needed.setdefault(parent, []).append(job)
    if lost:
        echo(f"files of {plural(lost, 'finished job')} that others need were removed: they run again")


def has_files_for(later: Job, job: Job, out: Path) -> bool:
    """True if what a later job reads of a finished one exists."""
    run = out / JOBS / job.id / RUN
    if job.kind == PREPARE:
        return (run / "dataset.json").is_file()
    if later.kind == BRANCH:
        names = {path.name for path in checkpoint_paths(run / "checkpoints")}
        step = later.identity["step"]
        return bool(names) if step is None else f"step-{step:08d}" in names
    if job.kind in (PRETRAIN, BRANCH):
        return (run / "model").is_dir()
    if later.kind == ENSEMBLE:
        return all((folder / SCORES).is_file() for folder in seeds_of(later, run))
    if later.kind in (FINETUNE, TOGETHER):
        return (Path(later.options["init_from"]) / "model").is_dir()
    return run.is_dir()


def without_models(later: Job, job: Job, out: Path) -> bool:
    """True if the command that repeats a job lacks the fine-tuned models of one that it depends on."""
    run = out / JOBS / job.id / RUN
    if later.kind == ENSEMBLE:
        return not all((folder / "model").is_dir() for folder in seeds_of(later, run))
    return job.kind in (FINETUNE, TOGETHER) and not has_files_for(later, job, out)


def seeds_of(ensemble: Job, run: Path) -> list[Path]:
    """Folders of the seeds of an ensemble that are in `run`."""
    return [folder for folder in map(Path, ensemble.options["folders"]) if run.resolve() in folder.parents]
