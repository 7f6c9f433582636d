"""The job: training, probes, groups and files; resume; refusals."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from fastbert.finetuning.affinity import affinity as job
from fastbert.finetuning.affinity import run
from fastbert.finetuning.affinity.groups import choose_groups
from fastbert.finetuning.affinity.options import AffinityOptions
from fastbert.finetuning.affinity.setup import prepare_affinity
from fastbert.training import interrupts
from tests.finetuning.conftest import make_task, write_rows
from tests.flags import main

pytestmark = pytest.mark.figures

FAST = (
    *("--machine.threads", "1", "--machine.precision", "fp32", "--machine.device", "cpu"),
    *("--learning-rate", "3e-3", "--batch-size", "8", "--steps", "12", "--every", "5"),
)
NAMES = ["count", "same", "word"]
KINDS = dict(zip(NAMES, ("numbers", "pairs", "words"), strict=True))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, str]:
    """Name -> YAML file of a number, a pair and a word with a label. Only train is needed."""
    folder, found = tmp_path_factory.mktemp("tasks"), {}
    for number, (name, kind) in enumerate(KINDS.items()):
        (folder / name).mkdir()
        make_task(folder / name, kind, train=24 + 16 * number, dev=1)
        more = {"numbers": "kind: number\n", "pairs": "pair: pair\n", "words": ""}[kind]
        (folder / f"{name}.yaml").write_text(f"train: {name}/train.jsonl\n{more}")
        found[name] = str(folder / f"{name}.yaml")
    return found


def affinity(model: Path, tasks: list[str], out: Path, *more: str) -> int:
    return main(
        ["affinity", "--model", str(model), "--tasks", ",".join(tasks), "--out", str(out), *FAST, *map(str, more)]
    )


@pytest.fixture(scope="module")
def whole(bert, tasks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("affinity") / "out"
    assert affinity(bert, list(tasks.values()), out) == 0
    return out


def content(out: Path) -> dict:
    return json.loads((out / "affinity.json").read_text())


def rows(out: Path, name: str = "probes.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_the_results_are_means_over_the_probes(whole, bert, tasks, monkeypatch, capsys) -> None:
    """And another number of groups is chosen from the same matrix, without training."""
    results, probes = content(whole), rows(whole)
    assert json.loads((whole / "manifest.json").read_text())["job"] == "affinity"
    assert [row["step"] for row in probes] == [0, 5, 10] and results["probes"] == 3
    assert results["tasks"] == NAMES and results["steps"] == 12 and len({row["learning_rate"] for row in probes}) == 3
    table = np.array([row["affinity"] for row in probes])
    np.testing.assert_allclose(results["affinity"], table.mean(0), rtol=1e-12)
    np.testing.assert_allclose(results["standard_error"], table.std(0, ddof=1) / 3**0.5, rtol=1e-12)
    np.testing.assert_allclose(results["first_order"], np.mean([r["first_order"] for r in probes], 0), rtol=1e-12)
    np.testing.assert_allclose(results["losses"], np.mean([row["losses"] for row in probes], 0), rtol=1e-12)
    assert results["cost"]["training"]["gradients"] == 12 * 8
    assert results["cost"]["probes"]["gradients"] == pytest.approx(3 * 24 + 3 * 3 * 24 / 3)
    assert not (whole / "checkpoints").exists() and (whole / "affinity.png").read_bytes().startswith(b"\x89PNG")
    groups = choose_groups(np.array(results["affinity"]), 2)
    assert results["groups"]["members"] == [[NAMES[task] for task in group] for group in groups.members]
    metrics = (whole / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(job, "train_and_probe", None)
    capsys.readouterr()
    assert affinity(bert, list(tasks.values()), whole, "--groups", "1") == 0
    printed = capsys.readouterr().out
    assert content(whole)["groups"]["members"] == [NAMES] and "1: count" in printed and "(at most 1)" in printed
    assert rows(whole) == probes and (whole / "metrics.jsonl").read_bytes() == metrics
    harmful = np.array(results["affinity"])
    alone = choose_groups(harmful, 3, allow_alone=True)
    assert affinity(bert, list(tasks.values()), whole, "--groups", "3", "--allow-alone") == 0
    assert content(whole)["groups"]["members"] == [[NAMES[task] for task in group] for group in alone.members]


def test_the_order_of_the_tasks_and_the_probes_change_nothing(whole, bert, tasks, tmp_path) -> None:
    """The training is the same with fewer probes."""
    assert affinity(bert, list(tasks.values())[::-1], tmp_path / "out", "--every", "10") == 0
    assert rows(tmp_path / "out", "metrics.jsonl") == rows(whole, "metrics.jsonl")
    first, tenth = rows(tmp_path / "out")
    assert first == rows(whole)[0] and tenth["step"] == 10


def test_an_interrupted_run_continues_with_its_probes(whole, bert, tasks, tmp_path, monkeypatch, capsys) -> None:
    """A signal in the middle: a checkpoint is written, and the same command gives the same bytes. So it does after a
    kill, from the last checkpoint, and when everything is trained."""
    out, real = tmp_path / "out", run.ProbedTuner.train_step

    def stopped(tuner, batch) -> None:
        real(tuner, batch)
        if tuner.progress.step == 6:
            interrupts.receive(signal.SIGINT)
        if tuner.progress.step == 10:
            raise SystemExit(9)

    monkeypatch.setattr(run.ProbedTuner, "train_step", stopped)
    given = (bert, list(tasks.values()), out)
    assert affinity(*given) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000006"]
    assert not {"affinity.json", "probes.jsonl", "affinity.png"} & {path.name for path in out.iterdir()}
    with pytest.raises(SystemExit):
        affinity(*given)
    monkeypatch.setattr(run.ProbedTuner, "train_step", real)
    assert affinity(*given, "--seed", "1") == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(
            "fastbert.finetuning.affinity.affinity.write_probes", lambda *_: (_ for _ in ()).throw(SystemExit)
        )
        with pytest.raises(SystemExit):
            affinity(*given)
    assert "continues after step 8 of 12" in capsys.readouterr().err
    assert affinity(*given) == 0
    assert "continues after step 12 of 12" in capsys.readouterr().err
    for name in ("probes.jsonl", "metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    for cost in (content(out)["cost"], content(whole)["cost"]):
        assert (cost["training"]["gradients"], cost["probes"]["gradients"]) == (12 * 8, pytest.approx(144.0))


def test_every_batch_of_an_epoch_is_trained_once(bert, tasks) -> None:
    setup = prepare_affinity(AffinityOptions(model=str(bert), tasks=",".join(tasks.values()), out="x", batch_size=8))
    stream = setup.stream
    assert stream.batches == setup.options.steps == 3 + 5 + 7
    seen = {name: [] for name in NAMES}
    heads, trained = [], []
    for epoch in range(2):
        batches = [stream.at(epoch, index) for index in range(stream.batches)]
        heads.append([batch.head for batch in batches])
        trained += [batch.rows.tolist() for batch in batches]
        for name in NAMES:
            found = np.concatenate([batch.rows for batch in batches if batch.head == name])
            assert sorted(found) == list(range(len(found)))
            seen[name].append(found.tolist())
    assert heads[0] != heads[1] and all(first != second for first, second in seen.values())
    # the probes have an order of their own, and continue after the end of a split
    rows_of = [[batch.rows.tolist() for batch in setup.probe_batches(number)] for number in range(4)]
    assert [len(set(map(str, column))) for column in zip(*rows_of, strict=True)] == [4, 4, 4]
    assert sorted(row for batches_of in rows_of[:3] for row in batches_of[0]) == list(range(24))
    assert not [rows for batches_of in rows_of for rows in batches_of if rows in trained]


def test_refusals(bert, tasks, tmp_path, capsys) -> None:
    paths = list(tasks.values())
    untrained, twin = tmp_path / "untrained.yaml", tmp_path / "twin.yaml"
    write_rows(tmp_path / "dev.jsonl", [{"text": "a good", "label": "a"}, {"text": "a bad", "label": "b"}])
    untrained.write_text("dev: dev.jsonl\nlabels: a,b\n")
    twin.write_text(f"{Path(paths[2]).read_text().replace('word/', str(Path(paths[2]).parent) + '/word/')}name: same\n")
    for given, more, message in (
        (paths, ("--groups", "4"), "--groups must be at most 3, the number of tasks, not 4"),
        (paths[:1], (), "--tasks must name 2 to 12 tasks"),
        ([*paths, *paths], (), "a task called count is given twice"),
        ([*paths, str(twin)], (), "a task called same is given twice"),
        (paths, ("--every", "0"), "--every must be at least 1, not 0"),
        ([paths[0], str(untrained)], (), "the task untrained has no train split"),
        (paths, ("--max-length", "31"), "longer than the 30 positions"),
        ([paths[0], "none.yaml"], (), "none.yaml"),
        (paths, ("--glue-subset",), "--glue-subset is for GLUE"),
    ):
        assert affinity(bert, given, tmp_path / "out", *more) == 2
        assert message in " ".join(capsys.readouterr().err.split()), message
        assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert affinity(bert, paths, tmp_path / "full") == 2
    assert "is not empty and holds no results of fastbert affinity" in " ".join(capsys.readouterr().err.split())


def test_a_diverged_run_is_a_user_error(bert, tasks, tmp_path, capsys) -> None:
    assert affinity(bert, list(tasks.values()), tmp_path / "out", "--learning-rate", "1e30") == 2
    error = capsys.readouterr().err
    assert "Try a lower --learning-rate" in error and "warmup" not in error  # which is no option of affinity
