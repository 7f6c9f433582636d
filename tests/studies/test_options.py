"""What a sweep's YAML file may say, what is refused before any job starts, and which jobs the axes give."""

from pathlib import Path

import pytest

from fastbert.cli import main
from fastbert.errors import UserError
from fastbert.finetuning.tasks import check_glue_options
from fastbert.studies.sweep.options import SweepOptions, load_sweep
from fastbert.studies.sweep.sweep_plan import plan_sweep
from tests.studies.conftest import write_sweep


def jobs_of(folder: Path, axes: dict, **changes):
    return plan_sweep(*load_sweep(write_sweep(folder, axes, **changes))).jobs


@pytest.fixture
def refused(axes, tmp_path, capsys):
    def refused(*flags: str, **changes) -> str:
        """Standard error of a call that must return 2 and leave nothing."""
        out = tmp_path / "out"
        assert main(["sweep", write_sweep(tmp_path, axes, **changes), "--out", str(out), *flags]) == 2
        assert not out.exists()
        return " ".join(capsys.readouterr().err.split())

    return refused


def test_the_axes_give_every_combination(axes, words, tmp_path) -> None:
    tasks = [words, {"task": words, "name": "half", "train_fraction": 0.5, "epochs": 3, "learning_rates": [1e-3, 2e-3]}]
    jobs = jobs_of(
        tmp_path,
        axes,
        tasks=tasks,
        batch_sizes=[8, 16],
        learning_rates=["1e-3", 2e-3, 3e-3],
        seeds=[4, 0],
        finetune={"dropout": 0.2, "schedule": {"warmup": 0.1}},
    )
    found = {(j.model, j.task, j.seed, *j.setting.values()) for j in jobs}
    whole = {("words", rate, size, 2) for rate in (1e-3, 2e-3, 3e-3) for size in (8, 16)}
    half = {("half", rate, size, 3) for rate in (1e-3, 2e-3) for size in (8, 16)}
    assert found == {
        (model, task, seed, *setting)
        for model in ("narrow", "tupe")
        for task, *setting in whole | half
        for seed in (4, 0)
    }
    assert len({job.id for job in jobs}) == len(jobs) == 40
    first = jobs[0]
    assert first.options["first_seed"] == 4 and first.options["seeds"] == 1 and not first.options["save_model"]
    assert first.options["dropout"] == 0.2 and first.options["schedule"]["warmup"] == 0.1
    assert {job.options["train_fraction"] for job in jobs if job.task == "half"} == {"0.5"}
    # Half the text, and 3 epochs instead of 2.
    costs = {(job.task, job.setting["epochs"]): job.cost for job in jobs if job.model == "tupe"}
    assert costs["half", 3] / costs["words", 2] == pytest.approx(0.75, rel=0.1)


def test_what_is_left_out_takes_the_defaults_of_finetune(axes, tmp_path) -> None:
    left_out = dict.fromkeys(("learning_rates", "batch_sizes", "epochs", "seeds", "finetune"))
    jobs = jobs_of(tmp_path, axes, **left_out)
    assert [job.setting for job in jobs] == [{"learning_rate": 5e-5, "batch_size": 32, "epochs": 5}] * 2
    assert {job.options["machine"]["threads"] for job in jobs} == {1} and {job.seed for job in jobs} == {0}


def test_options_of_glue_reach_its_tasks_alone(axes, words, tmp_path) -> None:
    (tmp_path / "glue" / "RTE").mkdir(parents=True)
    read, _ = load_sweep(write_sweep(tmp_path, axes, tasks=["rte", words], finetune={"glue_subset": True}))
    read.check_inputs(glue := str(tmp_path / "glue"))
    rte, own = (read.options(read.models[0], task, glue) for task in read.tasks)
    assert (rte.glue_dir, rte.glue_subset, own.glue_dir, own.glue_subset) == (glue, True, None, False)
    for options in (rte, own):
        check_glue_options([options.task], options.glue_dir, options.glue_subset)


def test_a_job_is_what_defines_its_result(axes, models, words, tmp_path, monkeypatch) -> None:
    """Not names, paths, the order of axes, the size of a micro-batch or what is saved; but every option that trains."""

    def ids(folder: str = "b", **changes) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        return sorted(job.id for job in jobs_of(tmp_path / folder, axes, **changes))

    before = ids()
    (tmp_path / "link").symlink_to(models["narrow"])
    monkeypatch.chdir(Path(words).parent)
    moved = [{"name": "b", "path": models["tupe"]}, str(tmp_path / "link")]
    machine = axes["finetune"]["machine"] | {"micro_batch_size": 4}
    saved = {"machine": machine, "worst": 9, "save_model": True}
    assert ids(models=moved, tasks=[{"task": "words.yaml", "name": "other"}], seeds=[1, 0], finetune=saved) == before
    for change in (
        {"threads": 2},
        {"seeds": [5, 6]},
        {"epochs": 3},
        {"finetune": {"machine": machine, "weight_decay": 0.1}},
        {"tasks": [{"task": words, "train_fraction": 0.5}]},
        {"finetune": {"machine": machine | {"precision": "bf16"}}},
    ):
        assert not set(ids(**change)) & set(before), change


def test_an_entry_of_tasks_wins_over_the_sweep(axes, words, tmp_path) -> None:
    task = {"task": words, "batch_sizes": 4, "dropout": 0.3, "schedule": {"warmup": 0.2}}
    fixed = {"dropout": 0.1, "layer_decay": 0.8, "schedule": {"name": "cosine", "warmup": 0.0}}
    job = jobs_of(tmp_path, axes, tasks=[task], finetune=fixed)[0]
    assert job.setting["batch_size"] == 4 and job.identity["dropout"] == 0.3 and job.identity["layer_decay"] == 0.8
    assert job.identity["schedule.name"] == "cosine" and job.identity["schedule.warmup"] == 0.2


def test_refused_axes(refused, models, words) -> None:
    narrow, tupe = models.values()
    assert "sweep.yaml: models is empty" in refused(models=[])
    assert "sweep.yaml: tasks is missing" in refused(tasks=None)
    assert "models must be a list, found {'a': 'b'}" in refused(models={"a": "b"})
    assert "learning_rates is empty; give at least one" in refused(learning_rates=[])
    assert "seeds must be at least 1, not 0" in refused(seeds=0)
    assert "seeds is empty" in refused(seeds=[])
    assert "seeds must be the number of seeds, or a list of whole numbers, found [0.5]" in refused(seeds=[0.5])
    assert "epochs has an empty value" in refused(epochs=[1, None])
    assert "unknown option 'learning_rats'; did you mean 'learning_rates'?" in refused(learning_rats=[1e-5])
    assert "unknown option 'dropout'; put it under finetune" in refused(dropout=0.2)
    assert "unknown option 'learning_rate'; give learning_rates" in refused(learning_rate=1e-5)
    assert "finetune: unknown option 'dropot'; did you mean 'dropout'?" in refused(finetune={"dropot": 0.1})
    assert "finetune: batch_size cannot be given here; give batch_sizes" in refused(finetune={"batch_size": 8})
    assert "finetune: epochs is an axis" in refused(finetune={"epochs": 8})
    assert "threads cannot be given here" in refused(finetune={"machine": {"threads": 4}})
    assert "did you mean 'epochs'?" in refused(tasks=[{"task": words, "epoch": 3}])
    assert "models: unknown key 'pth'; did you mean 'path'?" in refused(models=[{"name": "a", "pth": narrow}])
    assert "has no task; give a GLUE task" in refused(tasks=[{"epochs": 3}])
    assert "has no path; give the folder" in refused(models=[{"name": "a"}])
    assert "expected a string or a mapping, found 7" in refused(models=[7])
    assert "threads must be a whole number from 1, found 0" in refused(threads=0)
    assert "learning_rate must be a number, found text ('fast')" in refused(learning_rates=["fast"])
    assert "learning_rates: learning_rate must be greater than 0, not -1.0" in refused(learning_rates=[-1.0])
    assert "batch_size must be at least 1, not 0" in refused(batch_sizes=[0])
    assert "a job has one fraction" in refused(tasks=[{"task": words, "train_fraction": "0.1,0.5"}])
    assert "different fractions above 0" in refused(tasks=[{"task": words, "train_fraction": 7}])
    # twice
    assert "learning_rates: 0.001 occurs twice" in refused(learning_rates=[1e-3, 0.001])
    assert "seeds: 1 occurs twice" in refused(seeds=[1, 1])
    assert "models: narrow occurs twice; give one of them a different name" in refused(
        models=[{"name": "narrow", "path": narrow}, {"name": "narrow", "path": tupe}]
    )
    assert "occurs twice" in refused(models=[{"name": "a", "path": narrow}, {"name": "b", "path": narrow}])
    assert "tasks: words occurs twice; give one of them a different name" in refused(tasks=[words, words])
    same = [words, {"task": words, "name": "again"}]
    assert "two jobs are the same: words, narrow" in refused(tasks=same)


def test_refused_before_any_job_starts(refused, axes, models, words, tmp_path) -> None:
    good = axes["models"]
    assert "there is no folder" in refused(models=[*good, str(tmp_path / "nowhere")])
    assert "none.yaml" in refused(tasks=[words, str(tmp_path / "none.yaml")])
    assert "tasks: unknown task 'colla'; did you mean 'cola'?" in refused(models=good[1:], tasks=["colla"])
    assert "max_length 31 is longer than the 30 positions" in refused(finetune={"max_length": 31})
    assert "a warm-up of 50 steps does not fit a run of 8" in refused(finetune={"schedule": {"warmup": 50}})
    assert "workers must be at least 1, not 0" in refused("--workers", "0")
    assert "unknown back end 'rey'; did you mean 'ray'?" in refused("--backend", "rey")
    assert "a Ray address is given, but the back end is local" in refused("--ray-address", "localhost:1")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "task.yaml").write_text(f"train: {Path(words).parent / 'train.jsonl'}\ndev: gone.jsonl\n")
    long = {"schedule": {"warmup": 7}}
    assert "'epochs': 1}: a warm-up of 7 steps does not fit a run of 4" in refused(epochs=[2, 1], finetune=long)
    assert "gone.jsonl does not exist" in refused(tasks=[str(cut / "task.yaml")])


def test_flags_win_over_the_file(axes, tmp_path) -> None:
    _, options = load_sweep(write_sweep(tmp_path, axes, workers=3, out="somewhere"))
    assert options == SweepOptions(workers=3, out="somewhere")
    with pytest.raises(UserError, match="workers must be at least 1, not -1"):
        load_sweep(write_sweep(tmp_path, axes, workers=-1))


def test_no_file(capsys, tmp_path) -> None:
    assert main(["sweep", "--workers", "2"]) == 2
    assert "needs a YAML file as its first argument" in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert "configuration file" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- models\n")
    assert main(["sweep", str(tmp_path / "list.yaml")]) == 2
    assert "expected a mapping with models, and tasks or evaluate" in capsys.readouterr().err
