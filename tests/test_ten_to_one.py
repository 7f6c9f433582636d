"""Scripts that compare pretrainings by transformers' Trainer and by fastbert, at toy size: one recipe for both, and
checkpoints of both measured by the same code."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert.cli import main
from fastbert.config import from_dict, load_yaml
from fastbert.data.stages import StageOptions
from fastbert.errors import UserError
from fastbert.pretraining.options import PretrainOptions

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHAPE = {"layers": 1, "width": 16, "heads": 2, "length": 16, "batch_size": 8, "log_every": 1, "seed": 3}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SHAPE.items()]


@pytest.fixture(scope="module")
def scripts():
    """The modules of the scripts."""
    folders = [str(SCRIPTS / name) for name in ("against_transformers", "ten_to_one")]
    sys.path[:0] = folders
    names = ("pretrain_with_trainer", "measure_checkpoints", "time_steps", "quality_report", "fine_tune")
    yield {name: importlib.import_module(name) for name in names}
    sys.path[:] = [path for path in sys.path if path not in folders]


@pytest.fixture(scope="module")
def trained(scripts, prepared, tmp_path_factory) -> Path:
    """A recipe and two trainings of it: `trainer` by transformers, `own` by fastbert."""
    folder = tmp_path_factory.mktemp("ten")
    recipe = folder / "recipe.yaml"
    recipe.write_text("position: absolute\nsteps: 4\nmilestones: '2'\ncheckpoint_every: 2\nmachine: {threads: 1}\n")
    common = [str(recipe), f"--data={prepared}", *FLAGS]
    call(scripts, [*common, f"--out={folder / 'trainer'}"])
    assert main(["pretrain", *common, f"--out={folder / 'own'}"]) == 0
    return folder


def call(scripts, words: list[str]) -> None:
    module = scripts["pretrain_with_trainer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain_with_trainer.py", *words])
        module.main()


def weights(trainer: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(trainer / f"step-{step}" / "model.safetensors")


def logged(out: Path) -> list[int]:
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert all(line["seconds"] > 0 for line in lines)
    return [line["step"] for line in lines]


def test_the_trainer_follows_the_recipe_and_continues_where_it_was_stopped(
    scripts, trained, prepared, tmp_path, monkeypatch
) -> None:
    module, out = scripts["pretrain_with_trainer"], tmp_path / "out"
    assert logged(trained / "trainer") == [1, 2, 3, 4]
    begin = module.Clock.on_step_begin

    def stop(self, args, state, *rest, **more):
        if state.global_step == 3:
            raise KeyboardInterrupt
        return begin(self, args, state, *rest, **more)

    words = [str(trained / "recipe.yaml"), f"--data={prepared}", *FLAGS, f"--out={out}"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Clock, "on_step_begin", stop)
        call(scripts, words)
    assert not (out / "step-4").exists()
    call(scripts, words)
    assert logged(out) == [1, 2, 3, 3, 4]  # from the checkpoint of step 2
    # The masks of the next batch are sampled before a checkpoint, so those of step 3 are others after it.
    for step, most in ((2, 0), (4, 3e-4)):
        expected, found = weights(trained / "trainer", step), weights(out, step)
        assert expected.keys() == found.keys()
        assert max((tensor - found[name]).abs().max() for name, tensor in expected.items()) <= most
    assert not torch.equal(*(weights(out, step)["cls.predictions.bias"] for step in (2, 4)))


def test_the_arguments_of_the_trainer_are_those_of_the_recipe(scripts, tmp_path) -> None:
    module = scripts["pretrain_with_trainer"]
    values = {"position": "absolute", "batch_size": 64, "steps": 100, "seed": 5}
    optimizer = {"learning_rate": 2e-3, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.97, "eps": 1e-7, "clip_norm": 0.5}
    more = {"optimizer": optimizer, "schedule": {"warmup": 0.2}, "machine": {"micro_batch_size": 16}}
    options = from_dict(PretrainOptions, {"data": "x", **values, **more}, "the test")
    module.refuse_other_recipes(options)
    found = module.arguments_of(options, tmp_path, "fp32")
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps, found.max_steps) == (16, 4, 100)
    names = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
    assert [getattr(found, name) for name in names] == list(optimizer.values())
    assert (found.get_warmup_steps(100), found.seed, found.bf16) == (20, 5, False)
    assert module.arguments_of(options, tmp_path, "bf16").bf16


def test_short_rows_come_first_also_after_an_interruption(scripts, trained, prepared, tmp_path, monkeypatch) -> None:
    module, out, seen = scripts["pretrain_with_trainer"], tmp_path / "out", []
    read = module.PackedRows.on_host

    def on_host(self, rows, *more):
        batch = read(self, rows, *more)
        seen.append((tuple(batch.input_ids.shape), rows.tolist()))
        return batch

    monkeypatch.setattr(module.PackedRows, "on_host", on_host)
    words = [str(trained / "recipe.yaml"), f"--data={prepared}", *FLAGS, f"--out={out}", "--machine.micro-batch-size=4"]
    words += ["--first-length=8", "--first-fraction=0.75"]
    call(scripts, words)
    assert [shape for shape, _ in seen[:8]] == [(8, 8)] * 6 + [(4, 16)] * 2  # two micro-batches a step
    assert all(rows[1::2] == [row + 1 for row in rows[::2]] and rows[0] % 2 == 0 for _, rows in seen[:6])
    whole = [sorted({row // 2 for row in rows}) for _, rows in seen[:6]]
    assert all(len(rows) == 4 for rows in whole)
    batches, export = seen[:8], weights(out, 4)
    begin = module.Clock.on_step_begin

    def stop(self, args, state, *rest, **more):
        if state.global_step == 3:
            raise KeyboardInterrupt
        return begin(self, args, state, *rest, **more)

    again = tmp_path / "again"
    words = [word.replace(str(out), str(again)) for word in words]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Clock, "on_step_begin", stop)
        call(scripts, words)
    seen.clear()
    call(scripts, words)
    assert seen[:4] == batches[4:]  # from the checkpoint of step 2
    assert max((tensor - export[name]).abs().max() for name, tensor in weights(again, 4).items()) <= 3e-4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--position=tupe-r"], "encoder.position is tupe-r; with transformers' Trainer it has to be absolute"),
        (["--optimizer.name=muon"], "optimizer.name is muon"),
        (["--norm=pre"], "encoder.norm is pre"),
        (["--schedule.name=constant"], "schedule.name is constant"),
        (["--initial-batch-size=8"], "stages.initial_batch_size is 8"),
        (["--first-length=8", "--first-offset"], "stages.first_offset is True"),
        (["--batch-size=8", "--machine.micro-batch-size=3"], "batch_size 8 is no multiple of micro_batch_size 3"),
        (["--minutes=1"], "give --steps"),
    ],
)
def test_what_the_example_of_transformers_does_not_have_is_refused(scripts, flags, message, tmp_path, capsys) -> None:
    given = [] if "--minutes=1" in flags else ["--steps=2"]
    position = [] if flags[0].startswith("--position") else ["--position=absolute"]
    with pytest.raises(SystemExit) as ended:
        call(scripts, ["--data=nothing", f"--out={tmp_path / 'out'}", *given, *position, *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_both_trainings_are_measured_by_the_same_code(
    scripts, trained, prepared, tmp_path, monkeypatch, capsys
) -> None:
    module, out = scripts["measure_checkpoints"], tmp_path / "measured.jsonl"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"sentence_good": "The people rest.", "sentence_bad": "People the rest."}\n')
    runs = [str(trained / name) for name in ("trainer", "own")]
    words = ["measure_checkpoints.py", *runs, f"--data={prepared}", "--length=16", f"--pairs={pairs}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", words)
    module.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["run"], row["step"]) for row in rows] == [(run, step) for run in runs for step in (2, 4)]
    assert all(row["pairs_count"] == 1 and row["pairs"] in (0, 0.5, 1) for row in rows)
    # The loss of the run's own validation, on the same rows with the same masks.
    metrics = [json.loads(line) for line in (trained / "own" / "metrics.jsonl").read_text().splitlines()]
    own = {row["step"]: row["loss"] for row in metrics if row["split"] == "validation"}
    assert [row["loss"] for row in rows[2:]] == pytest.approx([own[2], own[4]], abs=2e-3)  # batches of other sizes
    for run in runs:
        every = module.checkpoints(Path(run))
        assert list(every) == [2, 4] and module.checkpoints(Path(run), last=True) == {4: every[4]}
    monkeypatch.setattr(module, "measure", None)  # nothing is measured twice
    module.main()
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_seconds_of_steps_are_read_from_both(scripts, trained, monkeypatch) -> None:
    module = scripts["time_steps"]
    monkeypatch.setattr(module, "EVERY", 1)
    for name in ("trainer", "own"):
        times = module.seconds_of_steps(trained / name)
        assert len(times) == 4 and all(0 < time < 60 for time in times)


@pytest.fixture
def staged(scripts, trained):
    """Options of a run of four steps, of which three have short sequences."""
    options = scripts["measure_checkpoints"].options_of(trained / "own")
    return replace(options, stages=StageOptions(first_length=8, first_fraction=0.75))


def test_each_stage_is_timed_by_a_training_of_its_own(scripts, staged, tmp_path) -> None:
    module = scripts["time_steps"]
    arguments = type("Arguments", (), {"data": "data/wiki", "steps": 30, "threads": 2})
    options = replace(staged, machine=replace(staged.machine, micro_batch_size=4))
    stages = module.stages_of(options)
    assert [(stage.batch_size, stage.length) for stage in stages] == [(16, 8), (8, 16)]
    for stage, micro in zip(stages, (8, 4), strict=True):
        (tmp_path / "recipe.yaml").write_text(module.to_yaml(module.with_one_stage(options, stage, arguments)))
        found = load_yaml(PretrainOptions, tmp_path / "recipe.yaml")
        assert (found.batch_size, found.length, found.machine.micro_batch_size) == (*stage.shape, micro)
        assert (found.stages, found.steps, found.machine.threads) == (StageOptions(), 30, 2)
        assert (found.encoder, found.optimizer, found.seed) == (options.encoder, options.optimizer, options.seed)


def test_costs_of_stages(scripts, staged, prepared, monkeypatch) -> None:
    module = scripts["quality_report"]
    monkeypatch.setattr(module, "options_of", lambda run: staged)
    costs = module.costs_of(Path("run"), {"8": [900, 1000, 5000], "16": [3000]}, prepared)
    minutes, flops = zip(*(costs(steps) for steps in (1, 3, 4)), strict=True)
    assert minutes == pytest.approx((1 / 60, 3 / 60, 6 / 60))
    assert flops[1] == 3 * flops[0] and flops[2] - flops[1] > flops[0]  # attention at twice the length
    muon = replace(staged, optimizer=replace(staged.optimizer, name="muon"))
    monkeypatch.setattr(module, "options_of", lambda run: muon)
    more = [module.costs_of(Path("run"), {"8": [900], "16": [3000]}, prepared)(steps)[1] for steps in (1, 3, 4)]
    assert more[0] > flops[0] and [a - b for a, b in zip(more, flops, strict=True)] == [
        steps * (more[0] - flops[0]) for steps in (1, 3, 4)
    ]
    with pytest.raises(UserError, match="run has sequences of 16 tokens, which were not timed"):
        module.costs_of(Path("run"), {"8": [900]}, prepared)


def test_other_tokenizers_are_not_compared(scripts, trained, grown, tmp_path) -> None:
    module = scripts["measure_checkpoints"]
    arguments = type("Arguments", (), {"data": str(grown), "length": 16, "sequences": 4})
    with pytest.raises(UserError, match="has another tokenizer than"):
        module.masked_loss(trained / "own", arguments, module.MachineOptions(device="cpu"))


def test_fine_tunings_of_both_are_scored_after_the_last_epoch(scripts, trained, tmp_path, monkeypatch) -> None:
    module = scripts["fine_tune"]
    rows = [f'{{"sentence1": "the people {i}", "sentence2": "we", "label": "{"ab"[i % 2]}"}}' for i in range(16)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    task = tmp_path / "snli.yaml"
    task.write_text("train: train.jsonl\ndev: dev.jsonl\ntext: sentence1\npair: sentence2\nlabel: label\n")
    for model in (trained / "trainer" / "step-4", trained / "own"):
        out = tmp_path / model.name
        words = ["fine_tune.py", str(model), "--glue-dir=none", f"--snli={task}", f"--out={out}", "--max-length=16"]
        monkeypatch.setattr(sys, "argv", [*words, "--seeds=2", "--epochs=2", "--tasks", "snli"])
        module.main()
        found = json.loads((out / "scores.json").read_text())
        seeds = json.loads((out / "snli" / "results.json").read_text())["fractions"][0]["seeds"]
        assert found == {"snli": [100 * seed["last"]["dev"]["dev"]["accuracy"] for seed in seeds]}
        assert len(seeds) == 2 and seeds[0]["last"]["epoch"] == 2


def test_cost_at_which_a_quality_is_reached(scripts) -> None:
    reach = scripts["quality_report"].cost_to_reach
    curve = [(1.0, 6.0), (4.0, 5.0), (16.0, 4.0)]
    assert reach(curve, 4.5, True) == (pytest.approx(8.0), False)  # halfway in the logarithm of the cost
    assert reach(curve, 6.5, True) == (1.0, True) and reach(curve, 3.9, True) is None
    rising = [(cost, -value) for cost, value in curve]
    assert reach(rising, -4.0, False) == (pytest.approx(16.0), False) and reach(rising, -3.0, False) is None


def test_report_of_two_contestants(scripts, prepared, trained, tmp_path, monkeypatch) -> None:
    module = scripts["quality_report"]
    rows = [("trainer", 2, 6.0, 0.5), ("trainer", 4, 5.0, 0.6), ("own", 2, 5.0, 0.55), ("own", 4, 4.0, 0.7)]
    keys = ("run", "step", "loss", "pairs")
    measured = [dict(zip(keys, (str(trained / run), *more), strict=True)) for run, *more in rows]
    (tmp_path / "measured.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in measured))
    speeds = {
        str(trained / "trainer"): {"16": [60_000, 120_000, 70_000]},
        str(trained / "own"): {"16": [7_000, 6_000, 5_000]},
    }
    (tmp_path / "speed.json").write_text(json.dumps({"milliseconds": speeds}))
    words = ["quality_report.py", f"--measured={tmp_path / 'measured.jsonl'}", f"--speed={tmp_path / 'speed.json'}"]
    words += [f"--data={prepared}", "--target=Trainer", f"--out={tmp_path / 'report'}"]
    words += ["--contestant", "Trainer", str(trained / "trainer"), "--contestant", "own", str(trained / "own")]
    for seed, scores in enumerate(({"sst2": [70, 72, 80]}, {"sst2": [68, 70, 69]})):
        (tmp_path / f"{seed}.json").write_text(json.dumps(scores))
    words += ["--fine-tuned", "own", str(tmp_path / "0.json"), str(tmp_path / "1.json")]
    monkeypatch.setattr(sys, "argv", words)
    module.main()
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "| contestant | sst2 |" in text and "| own | 74.0, 69.0 (68.0 to 80.0) |" in text
    assert "| Trainer | 1 | 16: 70000.0 (60000.0 to 120000.0) | 4.7 | 5.000 | 60.0 |" in text
    # 2 steps of 6 s are 4.3 % of 4 steps of 70 s; at equal FLOPs of a step they are half of them.
    assert "| own | masked loss (nats) | 5.000 | at most 4.3% | at most 50.0% |" in text
    assert "| own | minimal pairs right (%) | 60.000 | 5.4% | 63.0% |" in text
    assert "| Trainer | masked loss (nats) | 5.000 | 100.0% | 100.0% |" in text
    assert (tmp_path / "report" / "quality.png").read_bytes()[:4] == b"\x89PNG"
    words[-1] = str(tmp_path)
    with pytest.raises(SystemExit):
        module.main()
