"""Runs of the infinite schedule: resumed in every phase, lengthened, branched off and annealed, each equal to the bit
to a run planned so from its start."""

import errno
import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from fastbert.config import from_dict, load_yaml, to_dict
from fastbert.data.stages import StageOptions
from fastbert.errors import UserError
from fastbert.pretraining import branch, dry_run, on_ray, pretrain
from fastbert.pretraining.options import LAUNCH, PretrainOptions
from fastbert.pretraining.run import RunFolder, begins_with, read_sealed, stored_options
from fastbert.training.options import PretrainScheduleOptions
from fastbert.training.schedules import learning_rate_factor
from tests.flags import main
from tests.pretraining.test_resume import metrics
from tests.stand_ins import stop_before

STEPS, ANNEALING = 24, 4  # a constant rate after 8 to 20 steps
INFINITE = ("--schedule.name", "infinite", "--schedule.warmup", "3", "--schedule.cooldown", "5")


@pytest.fixture(autouse=True)
def without_reports(monkeypatch) -> None:
    """Runs end without export and report, which other tests check."""
    monkeypatch.setattr(pretrain, "finish", lambda *given: None)


@pytest.fixture
def small(flags) -> list[str]:
    """A run of a fraction of a second, without its schedule and steps."""
    return [
        *("pretrain", *flags, "--layers", "1", "--log-every", "2", "--eval-every", "8", "--eval-sequences", "4"),
        *("--checkpoint-every", "4", "--keep-checkpoints", "20", "--machine.micro-batch-size", "8"),
    ]


@pytest.fixture
def infinite(small) -> list[str]:
    return [*small, *INFINITE, "--schedule.annealing", str(ANNEALING)]


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    """A finished run of `infinite` with STEPS steps, which is not changed."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(trained: Path, infinite) -> Path:
    if not trained.exists():
        assert main([*infinite, "--steps", str(STEPS), "--out", str(trained)]) == 0
    return trained


def copy_of(run: Path, to: Path, last: int) -> Path:
    """The run as it was killed after the checkpoint of step `last`."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > last:
            shutil.rmtree(path)
    return to


def config(run: Path) -> PretrainOptions:
    return replace(load_yaml(PretrainOptions, run / "config.yaml"), out=None)


def assert_equal(ours: Path, theirs: Path) -> None:
    """Records, options, science, and the last checkpoint."""
    assert metrics(ours) == metrics(theirs)
    assert config(ours) == config(theirs)
    manifests = [json.loads((run / "manifest.json").read_text()) for run in (ours, theirs)]
    assert manifests[0]["science"] == manifests[1]["science"]
    assert manifests[0]["experiment"] == manifests[1]["experiment"]
    last = max((theirs / "checkpoints").iterdir()).name
    for name in ("model", "optimizer"):
        found = [(run / "checkpoints" / last / f"{name}.safetensors").read_bytes() for run in (ours, theirs)]
        assert found[0] == found[1]
    states = [json.loads((run / "checkpoints" / last / "state.json").read_text()) for run in (ours, theirs)]
    assert states[0]["options"] == states[1]["options"] and states[0]["science"] == states[1]["science"]


def interrupted(monkeypatch, step: int, arguments: list[str]) -> None:
    with monkeypatch.context() as patch:
        stop_before(patch, step)
        assert main(arguments) == 130


def stopped_by_control_c(*given: object) -> None:
    raise KeyboardInterrupt


def test_the_end_of_the_constant_phase_is_logged_validated_and_retained(infinite, tmp_path) -> None:
    run = tmp_path / "run"
    rare = ["--log-every", "100", "--eval-every", "100", "--checkpoint-every", "7", "--keep-checkpoints", "1"]
    assert main([*infinite, *rare, "--steps", str(STEPS), "--out", str(run)]) == 0
    assert [(row["step"], row["split"]) for row in metrics(run)] == [
        (step, split) for step in (20, 24) for split in ("train", "validation")
    ]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000020", "step-00000024"}


def test_killed_in_every_phase(run, infinite, tmp_path, monkeypatch) -> None:
    """Before a random step of warm-up, cooldown, constant phase and annealing, with all later checkpoints lost."""
    broken = tmp_path / "broken"
    chance = random.Random(0)
    for first, last in ((0, 3), (3, 8), (8, 20), (20, 24)):
        start = ["pretrain", "--resume"] if broken.exists() else [*infinite, "--steps", str(STEPS), "--out"]
        interrupted(monkeypatch, chance.randrange(first, last), [*start, str(broken)])
    assert main(["pretrain", "--resume", str(broken)]) == 0
    assert_equal(broken, run)


@pytest.mark.parametrize("again", [["--steps", "32"], []])
def test_a_run_lengthened_in_its_constant_phase(again, run, infinite, tmp_path, monkeypatch, capsys) -> None:
    """Killed between the writes of manifest.json and config.yaml, then before and after its next checkpoint."""
    planned, long = tmp_path / "planned", copy_of(run, tmp_path / "long", last=16)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_config", stopped_by_control_c)
        assert main(["pretrain", "--resume", str(long), "--steps", "32"]) == 130
    assert config(long).steps == 24 and json.loads((long / "manifest.json").read_text())["science"]["steps"] == 32
    capsys.readouterr()
    interrupted(monkeypatch, 18, ["pretrain", "--resume", str(long), *again])
    printed = capsys.readouterr().err
    assert "lengthened from 24 to 32 steps" in printed
    assert "warm-up to step 3, cooldown to step 8, constant to step 28, annealing to step 32" in printed
    interrupted(monkeypatch, 22, ["pretrain", "--resume", str(long), *again])
    assert "differs" not in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(long), *again]) == 0
    assert main([*infinite, "--steps", "32", "--out", str(planned)]) == 0
    assert_equal(long, planned)


def test_lengthened_twice_at_the_end_of_its_constant_phase(run, infinite, tmp_path) -> None:
    """Equal to a run with that step as a milestone: the step was logged and validated. The fractions in a YAML file
    remain what they were at the start."""
    planned, long = tmp_path / "planned", copy_of(run, tmp_path / "long", last=20)
    file = tmp_path / "x.yaml"
    file.write_text(
        (long / "config.yaml").read_text().replace("annealing: 4.0", "annealing: 0.1667").replace("  final: 0.1\n", "")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "train", lambda *given, **more: 0)
        assert main(["pretrain", "--resume", str(long), "--steps", "28"]) == 0  # nothing is written yet
    for steps in ("28", "30"):
        with pytest.MonkeyPatch.context() as patch:
            stop_before(patch, 20)
            assert main(["pretrain", str(file), "--resume", str(long), "--steps", steps]) == 130
    assert main(["pretrain", "--resume", str(long)]) == 0
    assert main([*infinite, "--steps", "30", "--milestones", "20", "--out", str(planned)]) == 0
    assert_equal(long, planned)


def test_a_finished_run_with_a_constant_rate_is_lengthened(small, tmp_path, capsys) -> None:
    planned, long = tmp_path / "planned", tmp_path / "long"
    constant = [*small, "--schedule.name", "constant", "--schedule.warmup", "3"]
    assert main([*constant, "--steps", "6", "--out", str(long)]) == 0
    assert main(["pretrain", "--resume", str(long), "--steps", "10"]) == 0
    assert main([*constant, "--steps", "10", "--milestones", "6", "--out", str(planned)]) == 0
    assert_equal(long, planned)
    assert main(["pretrain", "--resume", str(long), "--steps", "9"]) == 2
    assert "A run is not shortened" in capsys.readouterr().err


def test_a_run_whose_annealing_has_begun_is_not_lengthened(run, tmp_path, capsys) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["pretrain", "--resume", str(run), "--steps", "32"]) == 2
    printed = capsys.readouterr().err
    assert "its learning rate has been annealing since step 20" in printed
    assert f"--branch {run}@20 --steps 32 --out ..." in printed
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_another_process_has_trained_meanwhile(run, tmp_path, monkeypatch, capsys) -> None:
    """Since the newest checkpoint was read, before the folder was locked."""
    long = copy_of(run, tmp_path / "long", last=24)
    before = read_sealed(long / "checkpoints" / "step-00000016")
    monkeypatch.setattr(RunFolder, "sealed", lambda folder: before)
    assert main(["pretrain", "--resume", str(long), "--steps", "32"]) == 2
    assert "another process has trained the run in the meantime" in capsys.readouterr().err
    assert (long / "manifest.json").read_bytes() == (run / "manifest.json").read_bytes()


def test_branches(run, infinite, tmp_path, capsys) -> None:
    """One that anneals from the newest constant checkpoint, interrupted; one that follows the schedule."""
    for name, step, given, planned in (
        ("release", 16, ["--branch", f"{run}@16", "--anneal", "0.2"], ["--steps", "19", "--schedule.annealing", "3"]),
        ("newest", 20, ["--branch", str(run), "--anneal", "5"], ["--steps", "25", "--schedule.annealing", "5"]),
        ("longer", 12, ["--branch", f"{run}@12", "--steps", "26"], ["--steps", "26"]),
    ):
        out, whole = tmp_path / name, tmp_path / f"{name}-whole"
        with pytest.MonkeyPatch.context() as patch:
            stop_before(patch, step + 1)
            assert main(["pretrain", *given, "--out", str(out)]) == 130
        assert os.stat(out / "checkpoints" / f"step-{step:08d}" / "model.safetensors").st_nlink > 1
        assert json.loads((out / "manifest.json").read_text())["branch"]["run"] == str(run)
        assert main(["pretrain", "--resume", str(out)]) == 0
        assert main([*infinite, *planned, "--out", str(whole)]) == 0
        assert_equal(out, whole)
    assert "differs" not in capsys.readouterr().err


def test_a_branch_whose_processes_were_restarted(run, tmp_path, monkeypatch) -> None:
    """The launcher gives the same command again, which resumes the branch."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ["pretrain", "--branch", f"{run}@16", "--anneal", "3", "--milestones", "17"]
    assert main([*arguments, "--out", str(whole)]) == 0
    interrupted(monkeypatch, 18, [*arguments, "--out", str(out)])
    monkeypatch.setattr(pretrain, "continues", lambda given, world: True)
    assert main([*arguments, "--out", str(out)]) == 0
    assert_equal(out, whole)
    assert len(json.loads((out / "manifest.json").read_text())["sessions"]) == 2


def test_a_branch_in_workers_of_ray(run, tmp_path, monkeypatch) -> None:
    """The driver chooses the folder, and each worker starts or resumes the branch with its options; here the driver
    itself, without Ray."""
    out = tmp_path / "out"

    def work(ray: object, given: PretrainOptions, name: str, *rest: object) -> int:
        return pretrain.pretrain(from_dict(PretrainOptions, to_dict(replace(given, **LAUNCH)), "the options"), name)

    for name, stand_in in (("check_ray", Mock()), ("connect", Mock()), ("follow", work)):
        monkeypatch.setattr(on_ray, name, stand_in)
    ray = ["--launch", "ray", "--processes", "2", "--out", str(out)]
    assert main(["pretrain", "--branch", f"{run}@16", "--anneal", "2", *ray]) == 0
    assert config(out).steps == 18 and metrics(out)[-1]["step"] == 18
    assert main(["pretrain", "--resume", str(out), "--steps", "19", *ray[:-2]]) == 2  # it has been annealed
    assert config(out).steps == 18


def test_a_branch_of_a_constant_rate_on_another_disk(small, tmp_path, monkeypatch) -> None:
    """Its linear annealing is that of wsd; files that cannot be linked are copied."""
    trunk, out, whole = tmp_path / "trunk", tmp_path / "out", tmp_path / "whole"
    every = ["--eval-every", "4"]
    constant = ["--schedule.name", "constant", "--schedule.warmup", "0.5", *every]
    assert main([*small, *constant, "--steps", "8", "--out", str(trunk)]) == 0

    monkeypatch.setattr(branch.os, "link", Mock(side_effect=OSError(errno.EXDEV, "Invalid cross-device link")))
    assert main(["pretrain", "--branch", f"{trunk}@8", "--anneal", "2", "--out", str(out)]) == 0
    wsd = ["--schedule.name", "wsd", "--schedule.warmup", "4", "--schedule.decay", "0.2", *every]
    assert main([*small, *wsd, "--steps", "10", "--milestones", "8", "--out", str(whole)]) == 0
    assert_equal(out, whole)


def test_a_branch_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    arguments = ["pretrain", "--branch", f"{run}@16", "--anneal", "0.5", "--out", str(out)]
    monkeypatch.setattr(dry_run, "SECONDS", 0.05)
    assert main([*arguments, "--dry-run"]) == 0 and not out.exists()
    assert "8 remaining of 24 steps" in capsys.readouterr().out
    for error in (
        KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(2, "x", "x"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(branch, "link_or_copy", Mock(side_effect=error))
            assert main(arguments) in (2, 130)
        assert os.listdir(tmp_path) == []
    assert "x is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "manifest", [None, "[]", {"data": {"folder": ""}}, {"data": {"folder": "", "fingerprint": "x"}}]
)
def test_a_branch_of_a_run_whose_manifest_is_damaged(manifest, run, tmp_path) -> None:
    """The checkpoint, which is protected by hashes, has all that is needed."""
    damaged, out = copy_of(run, tmp_path / "damaged", last=16), tmp_path / "out"
    (damaged / "manifest.json").unlink()
    if manifest is not None:
        whole = json.loads((run / "manifest.json").read_text())
        text = manifest if isinstance(manifest, str) else json.dumps(whole | manifest)
        (damaged / "manifest.json").write_text(text)
    options = branch.annealed(config(run), 16, 4)
    written = branch.branch(damaged, 16, options, out)
    state = read_sealed(run / "checkpoints" / "step-00000016").state
    assert written["science"]["data"] == state["science"]["data"] and written["encoder"] == state["encoder"]
    assert json.loads((out / "manifest.json").read_text()) == written
    assert begins_with(written, 16, state["science"]) and not begins_with(written, 17, state["science"])


def test_the_beginnings_of_a_run_that_is_lengthened_twice(run, tmp_path) -> None:
    """If newer checkpoints are damaged, one from before both lengthenings is used."""
    options, sealed = config(run), read_sealed(run / "checkpoints" / "step-00000012")
    manifest = {"science": sealed.state["science"]}
    for step, steps in ((12, 30), (14, 40)):
        begun = replace(sealed, step=step, state=sealed.state | {"science": manifest["science"]})
        options, _, manifest, reason = branch.lengthening(
            RunFolder(run), manifest, begun, options, replace(options, steps=steps)
        )
        assert reason is None and manifest["science"]["steps"] == steps == options.steps
    for step, steps, expected in ((12, 24, True), (13, 24, False), (14, 30, True), (12, 31, False)):
        assert begins_with(manifest, step, sealed.state["science"] | {"steps": steps}) == expected
    edited = {"science": sealed.state["science"] | {"steps": "many"}, "lengthened": "x"}
    assert branch.lengthening(RunFolder(run), edited, None, options, options) == (options, options, edited, None)


@pytest.mark.parametrize("name", ["steps", "eval_every", "checkpoint_every"])
def test_a_config_that_has_lost_a_computed_value(name, run, tmp_path) -> None:
    edited = copy_of(run, tmp_path / "edited", last=16)
    text = (edited / "config.yaml").read_text()
    (edited / "config.yaml").write_text("".join(x for x in text.splitlines(True) if not x.startswith(f"{name}:")))
    assert replace(stored_options(str(edited)), out=None) == config(run)
    shutil.rmtree(edited / "checkpoints")
    with pytest.raises(UserError, match=f"has lost {name}, which has a value since"):
        stored_options(str(edited))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--branch", "{run}@16"], "--branch needs one of --anneal 0.1"),
        (["--branch", "{run}@16", "--anneal", "0.1", "--steps", "30"], "--branch needs one of --anneal 0.1"),
        (["--branch", "{run}@16", "--steps", "30", "--minutes", "3"], "--branch needs one of --anneal 0.1"),
        (["--branch", "{run}@16", "--anneal", "1.5"], "--anneal must be .* a whole number of steps, not 1.5"),
        (["--branch", "{run}@16", "--anneal", "0"], "--anneal must be greater than 0"),
        (["--branch", "{run}@16", "--steps", "16"], "--steps 16 ends at or before step 16"),
        (["--branch", "{run}@17", "--anneal", "0.1"], "has no checkpoint of step 17; the newest are 24, 20, 16"),
        (["--branch", "{run}@24", "--anneal", "0.1"], "after step 24 of the infinite .* annealed: @20, @16, @12, @8"),
        (
            ["--branch", "{run}@4", "--anneal", "0.1"],
            "not after step 4 of the infinite schedule|after step 4 of the inf",
        ),
        (["--branch", "{run}@24", "--steps", "30"], "step 21 would be 0.55 of the peak instead of .* annealed: @20"),
        (["--branch", "{run}@16", "--steps", "18"], "step 15 would be .* instead of 0.55"),
        (["--branch", "{run}@16", "--steps", "30", "--seed", "3"], r"(?s)would change it:.*seed: 0 -> 3.*--init-from"),
        (["--branch", "{run}@16", "--steps", "30", "--schedule.constant", "0.9"], "schedule.constant: 0.55 -> 0.9"),
        (["--branch", "{run}@16", "--steps", "30", "--resume"], "--resume needs the folder|not both"),
        (["--branch", "{run}/model", "--steps", "30"], "it is no run of fastbert pretrain"),
        (
            ["--branch", "nothing@3", "--steps", "30"],
            "it is no run of fastbert pretrain .* such as --branch runs/x@9000",
        ),
        (["--anneal", "0.1"], "--anneal has no effect without --branch"),
        (["--branch", "--anneal", "0.1"], "--branch: a value is missing"),
        (["--branch", "{run}@16", "--anneal", "100%"], "--anneal must be a finite number, not '100%'$"),
        (["--resume", "{run}@16"], "a new run that begins with step 16 is started with --branch .*@16"),
    ],
)
def test_refused(given, message, run, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [one.format(run=run) for one in given]
    assert main(["pretrain", *arguments, *([] if "--resume" in given else ["--out", "out"])]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert os.listdir(tmp_path) == []


def test_a_damaged_checkpoint_or_other_data_is_refused(run, tmp_path, corpus, capsys) -> None:
    damaged = copy_of(run, tmp_path / "damaged", last=16)
    weights = damaged / "checkpoints" / "step-00000016" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    arguments = ["pretrain", "--anneal", "0.1", "--out", str(tmp_path / "out"), "--branch"]
    assert main([*arguments, str(damaged)]) == 2
    assert f"{weights} is damaged" in capsys.readouterr().err
    other = tmp_path / "other"
    assert main(["prepare", "--source", str(corpus), "--out", str(other), "--vocab-size", "500", "--workers", "1"]) == 0
    assert main([*arguments, str(run), "--data", str(other)]) == 2
    assert f"the data in {other} differs from that of {run}" in capsys.readouterr().err
    assert main([arguments[0], "tiny", *arguments[1:], str(run)]) == 2
    assert "leave out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


STAGED = PretrainOptions(
    length=64, batch_size=16, steps=100, schedule=PretrainScheduleOptions("infinite", 5, cooldown=15, annealing=10)
)


@pytest.mark.parametrize("step", [20, 45, 80, 90])
@pytest.mark.parametrize(
    "stages",
    [
        StageOptions(first_length=16, first_fraction=0.6),
        StageOptions(initial_batch_size=4, batch_warmup=0.25),
        StageOptions(first_length=32, initial_batch_size=4, batch_warmup=0.15),
    ],
)
def test_annealing_changes_no_batch_before_it(step, stages) -> None:
    """The first length ends with the constant rate at the latest."""
    old = replace(STAGED, stages=stages)
    new = branch.annealed(old, step, 9)
    assert new.steps == step + 9 and branch.unequal_beginning(old, new, step) is None
    if stages.first_length and step < 60:
        lengths = [stage.length for stage, _ in branch._plan(new).spans(step - 1, step + 1)]
        assert lengths == [stages.first_length, 64]
    with pytest.raises(UserError, match="is constant from step 20 to 90, not after step 19"):
        branch.annealed(old, 19, 9)


@pytest.mark.parametrize("name", ["constant", "wsd"])
def test_linear_annealing_of_the_other_schedules(name) -> None:
    """The warm-up, a fraction of the steps before, remains what it was."""
    old = replace(STAGED, schedule=PretrainScheduleOptions(name, 0.1, final=0.2, decay=0.3))
    new = branch.annealed(old, 60, 12)
    assert new.schedule == PretrainScheduleOptions("wsd", 10, final=0.2, decay=12 / 72)
    assert branch.unequal_beginning(old, new, 60) is None
    rates = [learning_rate_factor(new.schedule, step, 72) for step in range(59, 73)]
    assert rates == pytest.approx([1, *(1 - 0.8 * step / 12 for step in range(13))])
    if name == "wsd":
        with pytest.raises(UserError, match="is constant from step 10 to 70, not after step 71"):
            branch.annealed(old, 71, 12)


def test_what_depends_on_the_number_of_steps() -> None:
    """Warm-ups and stages that are fractions of the steps."""

    def differs(change: dict, done: int = 50) -> str | None:
        old = replace(STAGED, **change)
        return branch.unequal_beginning(old, replace(old, steps=200), done)

    assert differs({}) is differs({}, 90) is None and "step 91 would be 0.55" in differs({}, 91)
    assert differs({"schedule": PretrainScheduleOptions("wsd", 5)}, 80) is None
    assert "step 82 would be 1 of" in differs({"schedule": PretrainScheduleOptions("wsd", 5)}, 82)
    assert "step 1 would be 0.05" in differs({"schedule": PretrainScheduleOptions("constant", 0.1)})
    assert "step 6 " in differs({"schedule": PretrainScheduleOptions("linear", 5)}) or "step 7 " in differs(
        {"schedule": PretrainScheduleOptions("cosine", 5)}
    )
    assert differs({"stages": StageOptions(first_length=16, first_fraction=0.6)}) is None
    assert "the batches" in differs({"stages": StageOptions(first_length=16, first_fraction=0.4)})
    assert "the batches" in differs({"stages": StageOptions(initial_batch_size=4, batch_warmup=0.4)})
    assert differs({"stages": StageOptions(initial_batch_size=4, batch_warmup=40)}) is None


def test_init_from_an_annealed_checkpoint_suggests_an_earlier_one(run, small, tmp_path, capsys) -> None:
    checkpoints = run / "checkpoints"
    for model in (run, checkpoints / "step-00000024"):
        assert f"adapts better: --init-from {checkpoints / 'step-00000020'}" in branch.suggest_constant(str(model))
    for model in (checkpoints / "step-00000020", checkpoints / "step-00000004", tmp_path):
        assert branch.suggest_constant(str(model)) is None
    linear = tmp_path / "linear"
    assert main([*small, "--steps", "2", "--init-from", str(run), "--out", str(linear)]) == 0
    assert f"the learning rate of {run} has been annealed (infinite)" in capsys.readouterr().err
    assert "--schedule.name infinite retains one" in branch.suggest_constant(str(linear))
