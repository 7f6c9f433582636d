"""The training loop: accumulation, skipped updates, divergence, and no waiting for the device within a step."""

import json
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.data.batches import Batch
from fastbert.data.note_words import ContextWindows, Occurrences
from fastbert.data.stages import BatchPlan
from fastbert.data.tokenizer import WordPiece
from fastbert.model.note_dictionary import NoteDictionary
from fastbert.model.options import EncoderOptions, NoteDictionaryOptions
from fastbert.objectives.mlm import MLM
from fastbert.objectives.options import MLMOptions
from fastbert.pretraining import loop
from fastbert.training.finite import NotFiniteError, all_finite
from fastbert.training.lagged import LaggedScalars
from fastbert.training.optimizer_state import flatten_optimizer
from fastbert.training.optimizers import build_optimizer, clip_gradients, guarded_step
from fastbert.training.options import OptimizerOptions, ScheduleOptions
from fastbert.training.step import Updater, objective_step
from fastbert.training.world import World
from tests.flags import main
from tests.stand_ins import around_steps


def rows(run: Path, split: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def poison(monkeypatch, bad_steps: set[int]) -> None:
    """Makes the loss of a few steps infinite."""

    def before(trainer: loop.Trainer, step: int) -> None:
        forward = trainer.objective.forward
        if step in bad_steps:
            trainer.objective.forward = lambda inputs: {k: v * float("inf") for k, v in forward(inputs).items()}

    def after(trainer: loop.Trainer, step: int) -> None:
        trainer.objective.__dict__.pop("forward", None)

    around_steps(monkeypatch, before, after)


def test_a_bad_update_is_skipped_and_reported(flags, tmp_path, capsys, monkeypatch) -> None:
    poison(monkeypatch, {4, 11})
    run = tmp_path / "run"
    assert main(["pretrain", *flags, "--out", str(run)]) == 0
    printed = capsys.readouterr().err
    assert "step 5: loss" in printed and "step 12: loss" in printed and printed.count("update skipped") == 2
    train = rows(run, "train")
    assert train[-1]["skipped"] == 2
    assert json.loads((run / "report" / "summary.json").read_text())["skipped_updates"] == 2
    assert all(row["loss"] is not None and row["loss"] < 20 for row in train)
    assert all(tensor.isfinite().all() for tensor in load_file(run / "model" / "model.safetensors").values())


def test_the_skipped_update_leaves_no_trace(flags, tmp_path, monkeypatch) -> None:
    """With a constant rate, the weights after a skipped last step equal those of the step before."""
    constant = ["--schedule.name", "constant", "--schedule.warmup", "0"]
    for name, steps in (("a", "5"), ("b", "6")):
        with monkeypatch.context() as patch:
            if name == "b":
                poison(patch, {5})
            assert main(["pretrain", *flags, *constant, "--out", str(tmp_path / name), "--steps", steps]) == 0
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_divergence_stops_with_the_last_good_checkpoint(flags, tmp_path, capsys, monkeypatch) -> None:
    poison(monkeypatch, set(range(22, 30)))
    run = tmp_path / "run"
    assert main(["pretrain", *flags, "--out", str(run)]) == 2
    printed = capsys.readouterr().err
    assert (
        "not finite in 5 steps in a row" in printed
        and "step-00000021" in printed
        and "--optimizer.learning-rate" in printed
    )
    monkeypatch.undo()
    assert main(["pretrain", "--resume", str(run)]) == 0


def test_a_huge_rate_diverges_by_itself(flags, tmp_path, capsys) -> None:
    more = ["--optimizer.learning-rate", "1e30", "--optimizer.clip-norm", "0", "--norm", "pre"]
    assert main(["pretrain", *flags, *more, "--out", str(tmp_path / "run")]) == 2
    assert "not finite" in capsys.readouterr().err


class Sums(nn.Module):
    """Two losses, each the sum of w x over a part of the numbers x of a micro-batch."""

    loss_weights: ClassVar = {"a": 1.0, "b": 50.0}

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0]))
        self.inputs, self.after = [], []

    def sample(self, x: torch.Tensor, seed: int, step: int) -> SimpleNamespace:
        self.inputs.append((seed, step))
        counts = {"a": torch.tensor(len(x)), "b": (x > 1).sum()}
        return SimpleNamespace(input_ids=x, counts=counts, counted=True, counting=lambda value: value)

    def forward(self, part: SimpleNamespace) -> dict[str, torch.Tensor]:
        x = part.input_ids
        return {"a": (self.w * x).sum(), "b": (self.w * x)[x > 1].sum()}

    def after_step(self, inputs: list, updated: torch.Tensor, world: World) -> dict[str, torch.Tensor]:
        self.after.append(([part.input_ids.tolist() for part in inputs], bool(updated), self.w.item()))
        return {}


class Descent(torch.optim.Optimizer):
    """Plain gradient descent that skips updates like torch's fused optimizers."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.found_inf:
                    parameter -= group["lr"] * parameter.grad


MICRO_BATCHES = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0])]
GRADIENT = (1 + 2 + 3 + 5) / 4 + 50.0 * (2 + 3 + 5) / 3


def logbook_with(**methods) -> SimpleNamespace:
    """A logbook that does nothing, but for these methods."""
    return SimpleNamespace(
        **{name: lambda *given: None for name in ("log", "sync", "saved")} | {"tally": dict, **methods}
    )


def trainer_of(objective: nn.Module, optimizer: torch.optim.Optimizer | None = None, **changes) -> loop.Trainer:
    """Ten steps on MICRO_BATCHES, at 0.1 with four steps of warm-up and a linear descent, clipped to a norm of 3."""
    values = dict.fromkeys(("checkpointer", "validate")) | {
        "logbook": logbook_with(),
        "batches": SimpleNamespace(at=lambda step: MICRO_BATCHES, plan=BatchPlan.constant(2, 3)),
        "updater": Updater(objective, optimizer or Descent(objective.parameters(), {"lr": 1.0}), 3.0, "fp32"),
        "learning_rate": 0.1,
        "schedule": ScheduleOptions("linear", 4),
        **{"steps": 10, "log_every": 100, "eval_every": 100, "checkpoint_every": 100, "peak_flops": 1.0},
        **{"seed": 7, "state": {}},
    }
    return loop.Trainer(**(values | changes))


def test_a_step_in_closed_form() -> None:
    """Losses are means over the global batch, not means of the micro-batches' means; the gradient is clipped before the
    update, whose rate is that of its step, and is gone after it; and the objective learns of the update."""
    objective = Sums()
    trainer = trainer_of(objective)
    w = 2.0
    for step, factor in ((1, 2 / 4), (5, 1 - 1 / 6), (6, 1 - 2 / 6)):
        objective.inputs.clear()
        trainer.train_step(step)
        expected = {"loss": w * GRADIENT, "norm": GRADIENT, "finite": 1.0}
        assert trainer._lagged.pop() == (step, pytest.approx(expected, rel=1e-6))
        w -= 0.1 * factor * 3.0
        assert objective.w.item() == pytest.approx(w, rel=1e-6)
        assert objective.inputs == [(7, step)] * 2
        assert objective.after[-1] == ([[1, 2, 3], [5]], True, objective.w.item())
    objective.w.register_hook(lambda grad: grad * torch.inf)  # the loss itself stays finite
    trainer.train_step(7)
    assert objective.w.item() == pytest.approx(w, rel=1e-6) and not objective.after[-1][1]


class MeasuredSums(Sums):
    """Logged rows also have the mean of w."""

    def after_step(self, *arguments) -> dict[str, torch.Tensor]:
        return {"w": self.w.detach()[0].clone()}

    def flops(self, batch_size: int, length: int) -> float:
        return 1.0


def test_logged_rows_in_closed_form(monkeypatch) -> None:
    """Each row has the means over its own window, also of the speed, and the rate and the norm of its last step. A step
    takes a second, and is read one step late."""
    objective, rows, now = MeasuredSums(), [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    logbook = logbook_with(log=lambda *row: rows.append(row))
    trainer = trainer_of(objective, logbook=logbook, steps=8, log_every=3, milestones=frozenset({7}))
    for step in range(8):
        now[0] += 1.0
        trainer.train_step(step)
        with trainer.paused():  # also while a row is pending
            now[0] += 5.0
    trainer._record(trainer._lagged.pop())
    assert {row["tokens_per_second"] for _, _, row in rows} == {trainer.batches.plan.tokens(0, 1)}
    factors = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1 - 1 / 4, 1 - 2 / 4, 1 - 3 / 4]
    weights = [2.0]
    for factor in factors:
        weights.append(weights[-1] - 0.1 * factor * 3.0)
    assert [(done, split) for done, split, _ in rows] == [(end, "train") for end in (3, 6, 7, 8)]
    for (done, _, row), window in zip(rows, (range(3), range(3, 6), range(6, 7), range(7, 8)), strict=True):
        expected = {
            "loss": GRADIENT * sum(weights[step] for step in window) / len(window),
            "w": sum(weights[step + 1] for step in window) / len(window),
            "lr": 0.1 * factors[done - 1],
            "grad_norm": GRADIENT,
            "tokens": 6 * done,
            "skipped": 0,
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_exports_are_finite_and_do_not_count_in_the_rate(monkeypatch) -> None:
    """A step takes a second and an export five; the time of the run includes both."""
    objective, exported, rows, now = MeasuredSums(), [], [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def export(progress: loop.Progress) -> None:
        exported.append((progress.step, progress.seconds))
        now[0] += 5.0

    trainer = trainer_of(
        objective, logbook=logbook_with(log=lambda *row: rows.append(row)), steps=4, log_every=2, export=export
    )
    trainer._start_clock()
    for step in range(4):
        now[0] += 1.0
        trainer.train_step(step)
        trainer.progress.step = step + 1
        if step < 3:
            trainer.save_export()
    trainer._record(trainer._lagged.pop())
    assert exported == [(1, 1.0), (2, 7.0), (3, 13.0)]
    assert {row["tokens_per_second"] for _, _, row in rows} == {trainer.batches.plan.tokens(0, 1)}
    with torch.no_grad():
        objective.w.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="w"):
        trainer.save_export()
    assert len(exported) == 3


def test_only_the_lowest_loss_is_best_and_only_its_own_step_has_it() -> None:
    losses, saved = iter([3.0, 2.0, 2.5, 2.0, 1.0]), []
    objective = Sums()
    trainer = trainer_of(
        objective,
        build_optimizer(objective.named_parameters(), OptimizerOptions(), "cpu"),
        validate=lambda length: {"new": {"loss": next(losses)}},
        checkpointer=SimpleNamespace(save=lambda step, *_, metric, **__: saved.append((step, metric))),
    )
    best = []
    for step in range(1, 10):
        trainer.progress.step = step
        if step % 2:
            best.append(trainer.run_validation())
        trainer.save_checkpoint()
    assert best == [True, True, False, False, True] and trainer.progress.best == 1.0
    measured = {1: 3.0, 3: 2.0, 5: 2.5, 7: 2.0, 9: 1.0}
    assert saved == [(step, measured.get(step)) for step in range(1, 10)]


def test_the_loss_before_the_first_step_is_not_the_best() -> None:
    """No checkpoint has it. Of several splits, the mean decides here."""
    losses = iter([(0.5, 0.5), (3.0, 1.0), (1.0, 4.0)])
    objective, logged = Sums(), []
    trainer = trainer_of(
        objective,
        build_optimizer(objective.named_parameters(), OptimizerOptions(), "cpu"),
        validate=lambda length: {name: {"loss": loss} for name, loss in zip(("new", "old"), next(losses), strict=True)},
        best_by="mean",
        logbook=logbook_with(log=lambda step, split, row: logged.append((step, split, row["loss"]))),
    )
    best = []
    for step in (0, 1, 2):
        trainer.progress.step = step
        best.append(trainer.run_validation())
    assert best == [False, True, False] and trainer.progress.best == 2.0
    assert logged[:3] == [(0, "validation", 0.5), (0, "validation/old", 0.5), (1, "validation", 3.0)]


def test_a_checkpoint_before_the_first_step() -> None:
    """A run that is interrupted in its first validation is saved, without a loss to compare."""
    objective, saved = Sums(), []
    trainer = trainer_of(
        objective,
        build_optimizer(objective.named_parameters(), OptimizerOptions(), "cpu"),
        validate=lambda length: {"new": {"loss": 2.0}},
        checkpointer=SimpleNamespace(save=lambda step, *_, metric, **__: saved.append((step, metric))),
    )
    trainer.run_validation()
    trainer.save_checkpoint()
    assert trainer.progress.last_metric == 2.0 and saved == [(0, None)]


def test_the_best_of_another_split_is_forgotten(capsys) -> None:
    """A run that is resumed with another --best-by, or with the mean of other splits."""
    objective, saved = Sums(), []
    found, progress = {"new": {"loss": 1.0}, "old": {"loss": 4.0}}, loop.Progress(step=3)
    for best_by, splits in (("new", "new"), ("old", "old"), ("mean", "mean of new, old"), ("mean", "mean of new, old")):
        trainer = trainer_of(
            objective,
            build_optimizer(objective.named_parameters(), OptimizerOptions(), "cpu"),
            validate=lambda length: found,
            best_by=best_by,
            progress=progress,
            checkpointer=SimpleNamespace(save=lambda *_, metric_of, **__: saved.append(metric_of)),
        )
        changed = progress.best_of != splits
        assert trainer.run_validation() == changed and progress.best_of == splits
        trainer.save_checkpoint()
    assert saved == ["new", "old", "mean of new, old", "mean of new, old"] and progress.best == 2.5
    found["more"] = {"loss": 7.0}
    assert trainer.run_validation() and progress.best == 4.0
    printed = capsys.readouterr().err
    assert "now that with the lowest loss of old, no longer of new" in printed and printed.count("no longer") == 3


def test_a_checkpoint_stores_all_progress() -> None:
    """Each counter, and the sums of the log's window."""
    trained, resumed = Sums(), Sums()
    saved, pruned = {}, []
    checkpointer = SimpleNamespace(
        save=lambda step, tensors, state, **_: saved.update(tensors=tensors, state=json.loads(json.dumps(state))),
        prune=lambda *given: pruned.append(given),
    )
    whole, again = (
        trainer_of(
            objective,
            build_optimizer(objective.named_parameters(), OptimizerOptions(), "cpu"),
            checkpointer=checkpointer,
        )
        for objective in (trained, resumed)
    )
    counters = {f.name: 3 + i for i, f in enumerate(fields(loop.Progress)) if f.type in (int, float, "int", "float")}
    more = {"window_measured": {"w": 0.5}, "best": 1.5, "last_eval": {"step": 2, "loss": 1.75}, "last_metric": 1.75}
    more["best_of"] = "old"
    whole.progress = loop.Progress(**counters, **more)
    assert not [
        f.name for f in fields(loop.Progress) if getattr(whole.progress, f.name) == getattr(again.progress, f.name)
    ]
    objective_step(whole.updater, MICRO_BATCHES, 7, 3, learning_rate=0.1)
    whole.save_checkpoint()
    assert whole.progress.seconds > 0.0
    loop.load_weights(resumed, SimpleNamespace(step=3, path=Path("x"), **saved))
    again.restore(SimpleNamespace(step=3, path=Path("x"), **saved))
    assert again.progress == whole.progress
    assert torch.equal(trained.w, resumed.w) and trained.w != 2.0
    assert pruned == []  # while updates are skipped, older checkpoints stay
    saved["state"]["progress"]["skipped_in_row"] = 0
    again.restore(SimpleNamespace(step=3, path=Path("x"), **saved))
    assert pruned == [(3, "old")]


class NoWaiting(TorchDispatchMode):
    """Fails at operations that make the host wait for the device: values and data-dependent shapes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


def test_the_guard_of_this_test_works() -> None:
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(1).item()


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize(
    ("position", "optimizer"), [("absolute", "adamw"), ("tupe-r", "adamw"), ("tupe-r", "muon"), ("tupe-r", "lamb")]
)
@pytest.mark.parametrize(("with_notes", "whole_rows"), [(False, False), (True, False), (True, True)])
def test_a_step_waits_for_nothing(
    position: str, optimizer: str, whole_word: bool, with_notes: bool, whole_rows: bool
) -> None:
    words = WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"))
    config = EncoderOptions(layers=1, width=16, heads=2, position=position).resolve(8, 12)
    notes = NoteDictionary(NoteDictionaryOptions(), 3, 16, 0) if with_notes else None
    objective = MLM(config, MLMOptions(whole_word=whole_word), words, notes=notes).train()
    optimizer = build_optimizer(objective.named_parameters(), OptimizerOptions(optimizer), "cpu")
    # Word 2 of the dictionary at position 3 of the first row, two pieces long, and padding.
    arrays = ([2, 0], [1, 0], [0, 1], [3, 0], [2, 0], [3, 4, 0], [0, 0, 1])
    windows = ContextWindows(*map(torch.tensor, ([0, 1], [1, 0], [6, 0], [6, 1])), 8, whole_rows)
    noted = Occurrences(*map(torch.tensor, arrays), windows)
    batch = Batch(torch.randint(5, 8, (4, 12)), torch.arange(4), noted=noted)
    lagged = LaggedScalars()
    with NoWaiting():
        inputs = objective.sample(batch, 0, 0)
        loss = objective(inputs)["mlm"] / inputs.counts["mlm"]
        loss.backward()
        norm = clip_gradients(objective.parameters(), 1.0)
        finite = loss.isfinite() & norm.isfinite()
        guarded_step(optimizer, 1e-3, finite)
        measured = objective.after_step([inputs], finite)
        state = [*objective.state_dict().values(), *flatten_optimizer(optimizer)[0].values()]
        assert lagged.push(0, {"loss": loss, "finite": finite, "state_finite": all_finite(state)}) is None
    assert lagged.pop() == (0, {"loss": pytest.approx(loss.item()), "finite": 1.0, "state_finite": 1.0})
    assert lagged.pop() is None
    assert len(measured) == 4 * with_notes and (notes is None or notes.writes.tolist() == [0, 0, 1])


def test_validation_is_the_same_for_any_micro_batch_and_seed(flags, tmp_path) -> None:
    """The masks do not depend on the seed; only the weights differ, so without training the losses are equal."""
    losses = []
    for seed, micro in (("0", "4"), ("0", "16"), ("5", "4")):
        run = tmp_path / f"{seed}-{micro}"
        more = ["--seed", seed, "--machine.micro-batch-size", micro, "--optimizer.learning-rate", "1e-12"]
        assert main(["pretrain", *flags, *more, "--out", str(run), "--steps", "1", "--initializer-std", "1e-9"]) == 0
        losses.append(rows(run, "validation")[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] == pytest.approx(torch.tensor(600.0).log().item(), rel=1e-4)  # nothing known: log V
