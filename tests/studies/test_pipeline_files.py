"""Files of pipelines: the ids of their jobs, and errors before the first job."""

import json
import os
from pathlib import Path

import pytest

from fastbert.cli import main
from fastbert.errors import UserError
from fastbert.studies.pipelines import run
from fastbert.studies.pipelines.graph import ancestors
from fastbert.studies.pipelines.load import load_pipeline
from fastbert.studies.pipelines.report import verdict
from fastbert.studies.pipelines.results import Figure
from fastbert.studies.pipelines.runners import command_line
from fastbert.studies.pipelines.tunings import ENSEMBLE
from tests.studies.conftest import graph_of, write_pipeline


def test_ids_have_what_decides_a_result_and_nothing_else(pipeline, pipeline_inputs, tmp_path) -> None:
    """A change of an entry changes its jobs and those after them; out, workers and keep change none."""

    def jobs(**changes) -> dict[str, set[str]]:
        graph = graph_of(write_pipeline(tmp_path, pipeline, **changes), tmp_path / "out")
        found: dict[str, set[str]] = {}
        for job, entry in graph.entries.items():
            found.setdefault(entry, set()).add(job)
        return found

    plain = jobs()
    path = write_pipeline(tmp_path, pipeline, keep="all", workers=3)
    assert {job.id for job in graph_of(path, tmp_path / "elsewhere").jobs} == set().union(*plain.values())
    base, moved, short = pipeline["models"]
    later = {"base", "moved", "short", "pairs", "pll", "first", "second", "joint", "list"}
    for changes, wanted in (
        ({"models": [base | {"steps": 8}, moved, short]}, later),
        ({"models": [base, moved | {"replay": {"data": "text", "fraction": 0.2}}, short]}, {"moved", "pairs", "pll"}),
        ({"models": [base, moved, short | {"anneal": 1.0}]}, {"short", "pairs", "pll", "joint"}),
        ({"threads": 2}, later),
        ({"commands": [{"name": "list", "run": "ls {base}"}]}, {"list"}),
        ({"evaluate": [*pipeline["evaluate"][:1], pipeline["evaluate"][1] | {"sentences": 4}]}, {"pll"}),
        ({"models": [base | {"checkpoint_every": 1}, moved, short]}, set()),
    ):
        changed = jobs(**changes)
        assert {name for name in plain if plain[name] != changed[name]} == wanted, changes
    text = pipeline_inputs / "other.txt"
    about = text.stat()
    os.utime(text, ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))
    assert {name for name, its in jobs().items() if its != plain[name]} == {"other", "moved", "pairs", "pll"}
    os.utime(text, ns=(about.st_atime_ns, about.st_mtime_ns))
    graph = graph_of(write_pipeline(tmp_path, pipeline), tmp_path / "out")
    last = next(job for job in graph.jobs if job.kind == ENSEMBLE)
    names = {graph.entries[job] for job in ancestors(graph.jobs, [last.id])}
    assert names == {"text", "base", "first", "second"}


BAD = {
    "part of data": ({"data": {"text": {"source": "sotu", "part": "1/2"}}}, "part cannot be given here"),
    "no models": ({"models": None}, "models: give at least one model"),
    "unknown key": ({"modles": []}, "unknown option 'modles'"),
    "a name twice": ({"commands": [{"name": "base", "run": "true"}]}, "two entries are called base;"),
    "a reserved name": ({"commands": [{"name": "pll", "run": "true"}]}, "'pll' is not a name for an entry"),
    "no name": ({"models": [{"data": "text"}]}, "models: entry 1 has no name"),
    "no budget": ({"models": [{"name": "a", "data": "text"}]}, "give the budget of the pretraining: steps or tokens"),
    "minutes": ({"models": [{"name": "a", "minutes": 3}]}, "depends on the load of the machine"),
    "a warm-up that does not fit": (
        {
            **dict.fromkeys(("stages", "finetune", "commands", "evaluate")),
            "models": [{"name": "a", "pretrain": "small", "data": "text", "steps": 9}],
        },
        "models: a: a warm-up of 10000 steps does not fit a run of 9",
    ),
    "a baseline of another kind": ({"report": {"baseline": ["base"]}}, "report: baseline must be text, found ['base']"),
    "a name like a flag": ({"commands": [{"name": "-x", "run": "true"}]}, "the name '-x' begins with -, like a flag"),
    "data of another kind": ({"data": 3}, "data must be a mapping of names to options of fastbert prepare, found 3"),
    "the name of a placeholder": ({"commands": [{"name": "out", "run": "true"}]}, "must not be pairs, pll or out"),
    "save_model of a task": (
        {"stages": [{"name": "s", "tasks": [{"task": "rte", "save_model": False}]}]},
        "save_model cannot be given for single jobs; give keep next to stages",
    ),
    "mixture": ({"stages": [{"name": "s", "tasks": ["rte"], "mixture": {"together": True}}]}, "give together, target"),
    "a command that needs a later one": (
        {"commands": [{"name": "c", "run": "cat {d}/x"}, {"name": "d", "run": "true"}]},
        "commands: c: it needs 'd'; put that command above it",
    ),
    "an unknown option": (
        {"models": [{"name": "a", "steps": 3, "widht": 3}]},
        "unknown option 'widht'; did you mean 'width'?",
    ),
    "like nothing": ({"models": [{"name": "a", "like": "b"}]}, "like: there is no model 'b' above it"),
    "after nothing": ({"models": [{"name": "a", "steps": 3, "after": "b"}]}, "after: there is no model 'b' above it"),
    "a path with options": ({"models": [{"name": "a", "path": "x", "steps": 3}]}, "takes no steps"),
    "a missing path": (
        {"models": [{"name": "a", "path": "none/x"}], "stages": None, "finetune": None, "commands": None},
        "none/x",
    ),
    "a branch with options": ({"models": [{"name": "a", "branch": "b", "width": 3}]}, "leave width out"),
    "a branch of a wrong step": ({"models": [{"name": "a", "branch": "b@x", "steps": 3}]}, "model@step"),
    "seed instead of seeds": ({"models": [{"name": "a", "steps": 3, "seed": 3}]}, "give seeds"),
    "a missing text": ({"data": {"text": {"source": "none.txt"}}}, "none.txt"),
    "a tokenizer of its own": ({"data": {"text": {"source": "sotu", "tokenizer": "text"}}}, "is its own"),
    "an unknown baseline": ({"report": {"baseline": "bas"}}, "there is no model 'bas'; did you mean 'base'?"),
    "finetune without stages": ({"stages": None}, "finetune needs fine-tuning, but there are no stages"),
    "an unknown task": ({"stages": [{"name": "s", "tasks": ["none.yaml"]}]}, "none.yaml"),
    "a stage after nothing": ({"stages": [{"name": "s", "tasks": ["rte"], "after": "x"}]}, "there is no stage 'x'"),
    "stages in a stage": ({"stages": [{"name": "s", "tasks": ["rte"], "stages": "x"}]}, "give a second stage"),
    "no tasks": ({"stages": [{"name": "s", "tasks": []}]}, "tasks must be a list"),
    "zero seeds": ({"stages": [{"name": "s", "tasks": ["rte"], "seeds": 0}]}, "seeds must be a whole number from 1"),
    "an unknown model": ({"stages": [{"name": "s", "tasks": ["rte"], "models": "bse"}]}, "there is no model 'bse'"),
    "target alone": ({"stages": [{"name": "s", "tasks": ["rte"], "target": "rte"}]}, "together"),
    "two plls": ({"evaluate": [{"pll": "a"}, {"pll": "b"}]}, "evaluate: pll is given twice"),
    "a command without a line": ({"commands": [{"name": "c"}]}, "run is missing"),
    "a command of spaces": ({"commands": [{"name": "c", "run": " \n"}]}, "run is missing"),
    "a zero byte": ({"commands": [{"name": "c", "run": "ls \0"}]}, "contains the character U+0000"),
    "a list of words": ({"commands": [{"name": "c", "run": ["ls"]}]}, "commands: c: run must be text, found"),
    "a command after nothing": ({"commands": [{"name": "c", "run": "true", "after": "x"}]}, "there is no 'x'"),
    "a misspelt name in braces": (
        {"commands": [{"name": "c", "run": "awk '{print}' ${HOME} {bsae}/x"}]},
        "commands: c: {bsae} in the line is no name of this file; did you mean 'base'?",
    ),
    "out in data": ({"data": {"text": {"source": "sotu", "out": "x"}}}, "out cannot be given here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, pipeline, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    changes, message = BAD[case]
    assert main(["run", write_pipeline(tmp_path / "x", pipeline, **changes)]) == 2
    error = capsys.readouterr().err
    assert message in error and "study.yaml" in error and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == [tmp_path / "x"]


def test_stages_that_do_not_fit(pipeline, tmp_path, capsys) -> None:
    first, second, joint = pipeline["stages"]
    for stages, message in (
        ([first | {"tasks": joint["tasks"]}, second], "first has 2 tasks, each with an encoder of its own"),
        ([first | {"learning_rates": [1e-3, 2e-3]}, second], "first has 2 settings"),
        ([first | {"seeds": 3}, second], "first has 3 seeds and second 2"),
        ([first, second | {"models": ["short"]}], "first is for the models base only"),
        ([first | {"max_length": 99}], "max_length 99 is longer than the 16 positions of base;"),
        ([first, first | {"name": "again"}], "study.yaml: first and again have the same job (mood (again), base, "),
        (
            [first | {"tasks": [{"task": first["tasks"][0], "name": "mood (b)"}]}]
            + [first | {"name": name, "epochs": epochs} for name, epochs in (("b", 2), ("c", 3))],
            "stages: b: mood (b) is in stage first too; give it another name",
        ),
        ([first | {"schedule": {"warmup": 999}}], "warm"),
        ([joint | {"target": "mod"}], "did you mean 'mood'?"),
    ):
        assert main(["run", write_pipeline(tmp_path, pipeline, stages=stages), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error, error


def test_branches_that_cannot_begin(pipeline, tmp_path, capsys) -> None:
    """The same reasons as those of `fastbert pretrain --branch`, before the first job."""
    base = pipeline["models"][0]
    linear = base | {"schedule": {"name": "linear", "warmup": 1}}
    bare = {key: value for key, value in base.items() if key != "milestones"}
    few = dict.fromkeys(("stages", "finetune", "commands", "evaluate"))
    for models, message in (
        ([base, {"branch": "base@3", "anneal": 0.5}], "base keeps no checkpoint of step 3; give it milestones: 3"),
        ([base, {"branch": "base@4", "anneal": 0.5}], "which it is not after step 4 of the wsd schedule"),
        ([base, {"branch": "base@2", "steps": 2}], "--steps 2 ends at or before step 2"),
        ([linear, {"branch": "base", "steps": 6}], "the learning rate of base is never constant (schedule linear)"),
        (
            [linear, {"branch": "base@4", "steps": 6}],
            "step 4 cannot be continued to 6 steps: the learning rate of",
        ),
        (
            [bare, {"branch": "base", "anneal": 0.5}],
            "constant learning rate, which it has from step 1 to 3; give it",
        ),
    ):
        models[1] = {"name": "short", **models[1]}
        path = write_pipeline(tmp_path, pipeline, **few, models=models)
        assert main(["run", path, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "study.yaml: models: short: branch: " in error and message in error, error
    models = [base, {"name": "short", "branch": "base", "anneal": 0.5}, {"name": "long", "branch": "base", "steps": 6}]
    jobs = graph_of(write_pipeline(tmp_path, pipeline, **few, models=models), tmp_path / "out").jobs
    assert [job.options["branch"][-2:] for job in jobs if job.kind == "branch"] == ["@2", "@2"]


def test_entries_without_values_are_absent(pipeline, tmp_path) -> None:
    few = {"models": pipeline["models"][:1], "finetune": None, "commands": None}
    path = write_pipeline(tmp_path, pipeline, **few)
    text = Path(path).read_text()
    cut = text[: text.index("stages:")] + "stages:\nevaluate:\ncommands:\nreport:\n"
    Path(path).write_text(cut)
    assert [job.kind for job in graph_of(path, tmp_path / "out").jobs] == ["prepare", "prepare", "pretrain"]


def test_tokenizers_of_data_and_models_are_compared_before_the_first_job(pipeline, tmp_path) -> None:
    base, moved, _ = pipeline["models"]
    own = pipeline["data"]["other"] | {"tokenizer": None, "vocab_size": 400}
    few = {"data": pipeline["data"] | {"other": own}, "stages": None, "finetune": None, "commands": None}
    plain = {key: value for key, value in base.items() if key != "name"}
    for model, names in (
        (moved, "other and base"),
        ({"name": "mixed", **plain, "replay": {"data": "other"}}, "other and text"),
        ({"name": "seen", **plain, "eval_data": "more=other"}, "other and text"),
    ):
        path = write_pipeline(tmp_path, pipeline, **few, models=[base, model])
        with pytest.raises(UserError, match=f"models: {model['name']}: {names} have different tokenizers; under data"):
            graph_of(path, tmp_path / "out")


def test_more_seeds_of_a_stage_keep_the_jobs_of_the_first(pipeline, tmp_path) -> None:
    base = pipeline["models"][0] | {"seeds": [0, 7]}

    def trainings(seeds: int) -> dict[str, tuple[int, int]]:
        stages = [pipeline["stages"][0] | {"seeds": seeds}]
        few = {"models": [base], "stages": stages, "evaluate": None, "commands": None}
        jobs = graph_of(write_pipeline(tmp_path, pipeline, **few), tmp_path / "out").jobs
        return {job.id: (job.seed, job.setting["trial"]) for job in jobs if job.kind == "finetune"}

    two, three = trainings(2), trainings(3)
    assert two.items() < three.items() and len(three) == 6
    heads = [
        job.options["first_seed"]
        for job in graph_of(str(tmp_path / "study.yaml"), tmp_path).jobs[3:]
        if job.kind == "finetune"
    ]
    assert len(set(heads)) == 6


def test_checkpoints_without_a_head_are_not_scored(pipeline, models, tmp_path) -> None:
    few = {"models": [{"name": "bare", "path": models["narrow"]}], "stages": None, "finetune": None, "commands": None}
    graph = graph_of(write_pipeline(tmp_path, pipeline, **few, data=None), tmp_path / "out")
    assert graph.jobs == []
    assert graph.left_out == [
        "bare is not evaluated on minimal pairs: it has no head that scores words",
        "bare is not evaluated on pseudo-log-likelihood: its encoder predicts no masked words",
    ]


def test_the_cost_of_a_branch_with_a_budget_in_tokens(pipeline, tmp_path) -> None:
    base = {key: value for key, value in pipeline["models"][0].items() if key != "steps"} | {"tokens": 4 * 16 * 10}
    few = {"stages": None, "finetune": None, "commands": None, "evaluate": None}
    models = [base, {"name": "short", "branch": "base@2", "anneal": 0.5}]
    graph = graph_of(write_pipeline(tmp_path, pipeline, **few, models=models), tmp_path / "out")
    trunk, branch = (job.cost for job in graph.jobs if job.task == "pretraining")
    assert branch == pytest.approx(trunk / 10)


def test_changes_are_listed_option_by_option(pipeline, tmp_path) -> None:
    """Also where only the contents of files changed, or the file is as before."""
    few = {"evaluate": None, "commands": None, "models": pipeline["models"][:1], "stages": pipeline["stages"][:1]}

    def described(**changes) -> tuple:
        path = write_pipeline(tmp_path, pipeline, **few | changes)
        return graph_of(path, tmp_path / "out"), json.loads(json.dumps(run.describe_pipeline(load_pipeline(path)[0])))

    graph, axes = described()
    before = {"axes": axes, "jobs": [job.id for job in graph.jobs]}
    assert run.changed_lines(graph, {}, axes) == run.changed_lines(graph, before, axes) == []
    stage = few["stages"][0]
    changed = [stage | {"learning_rates": [1e-3, 2e-3], "weight_decay": 0.1, "seeds": 2}]
    other, after = described(stages=changed, data=pipeline["data"] | {"text": {"source": "sotu", "vocab_size": 301}})
    lines = run.changed_lines(other, before, after)
    task = stage["tasks"][0]
    assert "changed since the last call: data text: vocab_size: 300 -> 301" in lines
    assert "changed since the last call: stage first: seeds: 1 -> 2" in lines
    assert "changed since the last call: stage first: weight_decay: None -> 0.1" in lines
    assert f"changed since the last call: stage first: {task}: learning_rate: None -> [0.001, 0.002]" in lines
    before["jobs"][-1] = "00000000"
    assert run.changed_lines(graph, before, axes) == [
        "changed since the last call: the contents of its files",
        "1 job new or changed (1 of first); 1 no longer needed",
    ]


def test_the_verdict_names_the_better_model() -> None:
    """Bits per byte are better where they are lower; accuracies where they are higher."""
    values = {"a": {0: 2.0, 1: 2.1, 2: 2.2}, "b": {0: 1.5, 1: 1.61, 2: 1.7}}
    (line,) = Figure("x", values).compared("a")
    assert verdict(line, lower_is_better=False) == "a higher, by the t-test alone"
    assert verdict(line, lower_is_better=True) == "b lower, by the t-test alone"
    (line,) = Figure("x", values).compared("b")
    assert verdict(line, lower_is_better=True) == "b lower, by the t-test alone"
    (line,) = Figure("x", {"a": {0: 2.0, 1: 2.1}, "b": {0: 1.5, 1: 2.7}}).compared("a")
    assert verdict(line, lower_is_better=True) == "undecided"


def test_trainings_state_the_memory_that_they_are_expected_to_need(pipeline, tmp_path) -> None:
    def memory(**changes) -> dict[str, int]:
        models = [pipeline["models"][0] | changes, *pipeline["models"][1:]]
        graph = graph_of(write_pipeline(tmp_path, pipeline, models=models), tmp_path / "out")
        return {graph.entries[job.id]: job.memory for job in graph.jobs if "ensemble" not in job.kind}

    small, wide = memory(), memory(width=256, ffn=1024, heads=4)
    for entry in ("base", "short", "first", "second", "joint"):  # a process needs about 500 MB
        assert 4e8 < small[entry] < wide[entry] < 2e9
    assert small["text"] == small["list"] == 0


def test_names_in_braces_are_folders() -> None:
    """Once: a folder with braces in its name is not replaced again, and ${base} is the shell's."""
    folders = {"base": ["/a b", "/{out}"], "other": ["/c"]}
    line = command_line("x {base} ${base} {other}/y {print} {out}", folders, "/d")
    assert line == "x '/a b' '/{out}' ${base} /c/y {print} /d"
