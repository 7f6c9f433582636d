"""Runs whose batches change: logging, exact resume within and between stages, budgets, and refusals."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert.config import load_yaml
from fastbert.data.stages import BatchPlan, make_plan
from fastbert.pretraining import budget, loop
from fastbert.pretraining.budget import Costs
from fastbert.pretraining.options import PretrainOptions, science
from fastbert.pretraining.setup import PretrainSetup, prepare_setup
from fastbert.randomness import random_below
from fastbert.training import step as training_step
from tests.flags import main
from tests.stand_ins import around_steps, stop_before, stopped_clock

# Phase 1: steps 0 to 7, of which the batch grows in the first 4, from 2 to 4 sequences of 32 tokens; phase 2: 8 to 11.
STAGED = [
    *("--steps", "12", "--length", "32", "--batch-size", "4", "--machine.micro-batch-size", "2"),
    *("--first-length", "16", "--first-fraction", "0.67", "--initial-batch-size", "2", "--batch-warmup", "4"),
    *("--eval-every", "4", "--checkpoint-every", "1", "--keep-checkpoints", "20", "--log-every", "3"),
]
SHAPES = [(4, 16)] * 4 + [(8, 16)] * 4 + [(4, 32)] * 4
NOTES = ["--notes.enabled", "--notes.half-window", "4", "--notes.fraction", "1"]


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("tokens_per_second", "mfu")} for row in rows]


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer.name", "muon", "--objective", "electra", "--first-offset", *NOTES],
        ["--optimizer.name", "lamb", "--position", "absolute", "--document-mask", "--first-offset"],
    ],
    ids=["muon", "lamb"],
)
def test_resumes_exactly_within_and_between_stages(flags, tmp_path, monkeypatch, more) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    batched: list[tuple[int, int]] = []

    def watch(trainer: loop.Trainer, step: int) -> None:
        batches = list(trainer.batches.at(step))
        assert {len(batch.input_ids) for batch in batches} == {64 // batches[0].input_ids.shape[1]}  # micro-batches
        batched.append((sum(len(batch.input_ids) for batch in batches), batches[0].input_ids.shape[1]))

    with monkeypatch.context() as patch:
        around_steps(patch, watch)
        assert main(["pretrain", *flags, *STAGED, *more, "--out", str(whole)]) == 0
    assert batched == SHAPES
    arguments = [*flags, *STAGED, *more, "--out", str(broken)]
    for step in (2, 4, 6, 8, 10):  # within a stage, and at the first step of one
        with monkeypatch.context() as patch:
            stop_before(patch, step)
            assert main(["pretrain", *arguments]) == 130
        arguments = ["--resume", str(broken)]
    assert main(["pretrain", *arguments]) == 0
    assert metrics(whole) == metrics(broken)
    for name in ("model", "optimizer"):
        file = Path("checkpoints", "step-00000012", f"{name}.safetensors")
        ours, theirs = load_file(whole / file), load_file(broken / file)
        assert all(tensor.equal(theirs[key]) for key, tensor in ours.items()) and ours.keys() == theirs.keys()


def test_what_is_logged(flags, tmp_path, capsys, monkeypatch) -> None:
    """Tokens, and the rates across the borders of stages, which are averages over the steps of the window."""
    now, run = stopped_clock(monkeypatch), tmp_path / "run"
    around_steps(monkeypatch, before=lambda trainer, step: now.__setitem__(0, step + 1.0))
    assert main(["pretrain", *flags, *STAGED, "--out", str(run)]) == 0
    assert "12 steps: 4 of 4 x 16 tokens, 4 of 8 x 16 tokens, 4 of 4 x 32 tokens" in capsys.readouterr().err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train, validation = ([row for row in rows if row["split"] == split] for split in ("train", "validation"))
    tokens = [batch * length for batch, length in SHAPES]
    assert [(row["step"], row["tokens"]) for row in train] == [(done, sum(tokens[:done])) for done in (3, 6, 9, 12)]
    rates = [round(sum(tokens[done - 3 : done]) / 3, 1) for done in (3, 6, 9, 12)]
    assert [row["tokens_per_second"] for row in train] == rates
    assert [(row["step"], row["length"]) for row in train] == [(3, 16), (6, 16), (9, 32), (12, 32)]
    assert [(row["step"], row["length"], row["tokens"]) for row in validation] == [
        (done, length, sum(tokens[:done])) for done, length in ((4, 16), (8, 16), (12, 32))
    ]


def test_the_best_checkpoint_is_of_the_last_length(flags, tmp_path, monkeypatch) -> None:
    """Even if the losses of the first length are lower."""
    monkeypatch.setattr(
        PretrainSetup, "validate", lambda self, objective, length: {"new": {"loss": float(length), "accuracy": 0.0}}
    )
    run = tmp_path / "run"
    more = ["--keep-checkpoints", "1", "--eval-every", "2", "--checkpoint-every", "2"]
    assert main(["pretrain", *flags, *STAGED, *more, "--out", str(run)]) == 0
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000012"]
    state = json.loads((run / "checkpoints" / names[0] / "state.json").read_text())
    assert state["progress"]["best"] == 32.0


@pytest.mark.parametrize("position", ["tupe-r", "absolute"])
def test_an_offset_trains_the_later_positions_in_the_first_stage(flags, tmp_path, position) -> None:
    """Without it, their rows of the table keep their initial values until the sequences are longer."""
    given = [*flags, "--steps", "10", "--length", "32", "--batch-size", "2", "--first-length", "8", "--seed", "1"]
    given += ["--optimizer.weight-decay", "0", "--position", position, "--checkpoint-every", "9"]
    first = {0} if position == "absolute" else set()  # TUPE's position 0 has a score of its own
    for offset in ((), ("--first-offset",)):
        run = tmp_path / f"run{len(offset)}"
        assert main(["pretrain", *given, *offset, "--out", str(run)]) == 0
        setup = prepare_setup(load_yaml(PretrainOptions, run / "config.yaml"))
        before, after = (
            state["encoder.positions.table.weight"][:32]
            for state in (
                setup.objective().state_dict(),
                load_file(run / "checkpoints" / "step-00000009" / "model.safetensors"),
            )
        )
        moves = [random_below(1, "offset", step, 25) if offset else 0 for step in range(9)]
        seen = first | {1 + move + index for move in moves for index in range(7)}
        assert set((before != after).any(1).nonzero().flatten().tolist()) == seen
        assert len(seen) > 20 or not offset


def options(prepared: Path, **changes) -> PretrainOptions:
    given = PretrainOptions(data=str(prepared), batch_size=4, length=32, steps=10)
    encoder = replace(given.encoder, layers=1, width=16, heads=2)
    stages = replace(given.stages, **{name: changes.pop(name) for name in list(changes) if hasattr(given.stages, name)})
    return replace(given, **{"encoder": encoder, "stages": stages, **changes})


def test_budgets_count_every_stage(prepared, monkeypatch) -> None:
    staged = {"first_length": 16, "first_fraction": 0.5, "initial_batch_size": 2, "batch_warmup": 0.25}
    setup = prepare_setup(options(prepared, steps=None, tokens=112 * 128, **staged))
    found = budget.resolve_steps(setup)
    assert found.steps == 128  # 32 steps of 64 tokens, then 128
    # A second a step with 8 sequences of 16, three with 4 of 32, half a one while the batch grows.
    seconds = {(4, 16): 0.5, (8, 16): 1.0, (4, 32): 3.0}
    monkeypatch.setattr(budget, "timed_step", lambda setup, objective, seconds_, plan: seconds[plan.stages[0].shape])
    stopped_clock(monkeypatch)
    setup = prepare_setup(options(prepared, steps=None, minutes=750 / 60, **staged))
    assert budget.resolve_steps(setup).steps == 400  # 100 / 2 + 100 + 3 x 200
    assert budget.seconds_per_step(setup, None, 1.0) == pytest.approx(750 / 400)


def test_minutes_are_planned_for_an_idle_machine(prepared, tmp_path, monkeypatch, capsys) -> None:
    """Steps of 0.5 s, of 2 s while another process runs in the first 20 of the 30 s that are timed; validations of 2 s,
    and a disk that takes 1 s for a checkpoint."""
    now = stopped_clock(monkeypatch)

    def update(*arguments) -> None:
        now[0] += 2.0 if now[0] < 20 else 0.5

    def validate(setup, objective, length=None) -> dict[str, float]:
        now[0] += 2.0
        return {"loss": 1.0}

    monkeypatch.setattr(training_step, "guarded_step", update)
    monkeypatch.setattr(PretrainSetup, "validate", validate)
    monkeypatch.setattr(budget, "writing_seconds", lambda folder, size: 1.0)
    setup = prepare_setup(options(prepared, steps=None, minutes=10.0, out=str(tmp_path / "run")))
    found = budget.resolve_steps(setup)
    steps, spent = found.steps, now[0]
    validations = {*range(steps // 10, steps + 1, steps // 10), steps}
    checkpoints = validations | set(range(steps // 5, steps + 1, steps // 5))
    total = spent + 0.5 * steps + 2.0 * len(validations) + len(checkpoints) + 1 / 3  # the export too
    assert spent < 40 and 595 < total <= 600
    assert (found.eval_every, found.checkpoint_every) == (steps // 10, steps // 5)
    printed = capsys.readouterr().err
    assert f"planned for 10 minutes: {steps} steps of 4 x 32 tokens, 0.5 s a step; expected " in printed
    assert f"{len(validations)} validations" in printed and f"{len(checkpoints)} checkpoints" in printed
    assert "other processes disturbed the timing of steps" in printed
    assert not (tmp_path / "run").exists()


def test_a_timed_step_is_a_whole_training_step(prepared, monkeypatch) -> None:
    """The time includes everything that a training step does: each micro-batch forward and backward, clipping, an
    update, and the objective's work after it. The weights do not change."""
    calls = []
    machine = replace(PretrainOptions().machine, micro_batch_size=3)
    setup = prepare_setup(options(prepared, objective="electra", machine=machine))
    objective = setup.objective().eval()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}

    def spy(owner: object, name: str, note=lambda *given: None) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: calls.append((name, note(*given))) or real(*given))

    spy(objective, "sample", lambda batch, *_: (len(batch.row_indices), objective.training))
    spy(objective, "forward", lambda inputs: all(p.grad is None for p in objective.parameters()))
    spy(training_step, "clip_gradients", lambda *_: all(p.grad is not None for p in objective.parameters()))
    spy(training_step, "guarded_step")
    spy(objective, "after_step", lambda inputs, finite, world: (len(inputs), bool(finite)))
    found = budget.time_training(setup, objective, 1e-9, BatchPlan.constant(4, 32), 1)
    assert found.count == 1  # and one to warm up
    sampled = [("sample", (3, True)), ("sample", (1, True)), ("forward", True), ("forward", False)]
    assert calls == [*sampled, ("clip_gradients", True), ("guarded_step", None), ("after_step", (2, True))] * 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())


def test_short_budgets_have_the_most_steps_that_fit(prepared) -> None:
    """Although 19 steps have 19 validations, and 20 have ten; each of two exports takes as long as three steps."""
    asked = options(prepared, steps=None, checkpoint_words="1,2")
    costs = Costs(0.0, lambda batch_size, length: 1.0, 2.0, 0.0, 3.0, 0.0)
    for limit in (15.0, 39.0, 45.0, 57.0, 300.0):
        steps = costs.steps_in(limit + 6.0, lambda count: make_plan(asked.stages, 4, 32, count), asked)
        costly = {n: n + 2.0 * len({*range(max(1, n // 10), n + 1, max(1, n // 10)), n}) for n in range(1, 400)}
        assert steps == max(n for n, seconds in costly.items() if seconds <= limit)


def test_timed_networks_are_freed(prepared, tmp_path, monkeypatch) -> None:
    made = []
    real = PretrainSetup.objective

    def objective(self, initial: bool = True):
        built = real(self, initial)
        made.append(weakref.ref(built))
        return built

    monkeypatch.setattr(PretrainSetup, "objective", objective)
    setup = prepare_setup(options(prepared, steps=None, minutes=0.001, out=str(tmp_path / "run")))
    setup.options = budget.resolve_steps(setup)
    assert [reference() for reference in made] == [None]


def test_only_active_options_name_the_experiment(prepared) -> None:
    plain = options(prepared)
    for idle in ({"first_fraction": 0.5}, {"batch_warmup": 0.5}):
        assert science(options(prepared, **idle), "data") == science(plain, "data")
    for active in ({"first_length": 16}, {"initial_batch_size": 2}):
        assert science(options(prepared, **active), "data") != science(plain, "data")
    short = [science(options(prepared, first_length=16, first_offset=offset), "data") for offset in (False, True)]
    assert short[0] != short[1] and "first_offset" not in short[0]
    muon = replace(plain, optimizer=replace(plain.optimizer, name="muon"))
    momentum = [replace(each, optimizer=replace(each.optimizer, momentum=0.5)) for each in (plain, muon)]
    assert science(momentum[0], "data") == science(plain, "data") and science(momentum[1], "data") != science(muon, "")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--first-length", "64"], "first_length 64 is not shorter than length 32"),
        (["--first-length", "12"], "choose a first_length that divides length"),
        (["--initial-batch-size", "3"], "initial_batch_size 3 does not divide batch_size 4"),
        (["--batch-warmup", "13"], "the batch grows for 13 steps, longer than the run of 12"),
        (["--first-fraction", "1.5"], "--first-fraction must be in (0, 1), not 1.5"),
        (["--first-length", "2", "--batch-size", "65536", "--initial-batch-size", "32768"], "less than one batch of"),
        (["--optimizer.name", "mun"], "did you mean 'muon'"),
    ],
)
def test_impossible_stages_are_refused_before_anything_is_written(flags, tmp_path, capsys, more, message) -> None:
    staged = {flag: value for flag, value in zip(STAGED[::2], STAGED[1::2], strict=True)}
    staged |= dict(zip(more[::2], more[1::2], strict=True))
    plain = dict(zip(flags[::2], flags[1::2], strict=True))
    arguments = [word for pair in (plain | staged).items() for word in pair]
    assert main(["pretrain", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_yaml_and_resume_preserve_the_stages(flags, tmp_path, capsys) -> None:
    file, run = tmp_path / "x.yaml", tmp_path / "run"
    file.write_text("first_length: 16\nfirst-fraction: 0.5\nbatch_size: 4\n")
    assert main(["pretrain", str(file), *flags, "--steps", "4", "--batch-size", "4", "--out", str(run)]) == 0
    stored = load_yaml(PretrainOptions, run / "config.yaml")
    assert (stored.stages.first_length, stored.stages.first_fraction) == (16, 0.5)
    assert main(["pretrain", "--resume", str(run), "--first-fraction", "0.75"]) == 2
    assert "first_fraction: 0.5 -> 0.75" in capsys.readouterr().err
