"""Fine-tuning on several processes equals one process; a run that was stopped on several continues on any number."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from fastbert.errors import UserError
from fastbert.finetuning.finetune import check_same_on_all_ranks
from fastbert.training.world import ONE_PROCESS, World
from tests.finetuning.conftest import finetune, make_task, results
from tests.finetuning.test_resume import bytes_of
from tests.finetuning.test_tokens import make_sentences
from tests.finetuning.tune_ranks import command, tune
from tests.flags import last_given
from tests.ranks import output_of, run_ranks

RANKS = 3
MORE = (
    # 3 batches, the last of 2 rows; ranks have up to 6 rows of the others, in parts of 5, and the last part of one rank
    # is empty.
    *("--machine.micro-batch-size", "5", "--epochs", "3", "--log-every", "1", "--seeds", "1", "--batch-size", "16"),
    *("--machine.threads", "1", "--machine.precision", "fp32", "--machine.device", "cpu", "--learning-rate", "2e-3"),
)
SENTENCES = 2 * 16 + 2


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("tasks")
    flags = ["--task", "tagging", "--custom.kind", "tokens"]
    for split, count in (("train", SENTENCES), ("dev", 12)):
        (folder / f"{split}.conll").write_text(make_sentences(random.Random(split), count, 20))
        flags += [f"--custom.{split}", str(folder / f"{split}.conll")]
    made = {"tagging": flags}
    for name in ("pairs", "words"):
        (folder / name).mkdir()
        made[name] = make_task(folder / name, name, train=SENTENCES, dev=12)
    return made


@pytest.fixture(scope="module")
def tuned(bert, tasks, tmp_path_factory) -> Path:
    """Folder with a folder for each case, and one of one process."""
    folder = tmp_path_factory.mktemp("tuned")
    cases = {
        "pairs": ("pairs", [None], ["--symmetric"]),
        "resumed": ("pairs", ["terminated", None], ["--symmetric"]),
        "tagging": ("tagging", [None], []),
        "soft": ("words", ["soft labels"], []),
        "local": ("tagging", ["local means"], []),
    }
    described = {}
    for name, (task, changes, more) in cases.items():
        flags = ["--model", str(bert), *tasks[task], *MORE, *more, "--out", str(folder / name)]
        alone = name not in ("resumed", "local")  # these are compared with the same task's
        described[name] = {"flags": last_given(flags), "changes": changes, "alone": alone}
    (folder / "cases.json").write_text(json.dumps(described))
    codes = run_ranks(tune, RANKS, folder / "ranks", str(folder / "cases.json"), str(folder / "codes.json"))
    assert codes == [0] * RANKS, output_of(folder / "ranks")[-5000:]
    return folder


def distance(a: Path, b: Path, seed: str = "seed-0") -> float:
    """The largest difference between the losses, gradient norms and rates of two trainings; all else must be equal."""
    found = []
    for one, other in zip(*(rows(out / seed) for out in (a, b)), strict=True):
        assert one.keys() == other.keys() and [one["step"], one["split"]] == [other["step"], other["split"]]
        for name, value in one.items():
            if name in ("loss", "grad_norm", "lr"):
                found.append(abs(value - other[name]))
            else:
                assert value == other[name], name
    return max(found)


def rows(seed: Path) -> list[dict]:
    return [json.loads(line) for line in (seed / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["pairs", "tagging", "soft"])
def test_ranks_equal_one_process(tuned, name) -> None:
    several, alone = tuned / name, tuned / f"{name}-alone"
    assert json.loads((tuned / "codes.json").read_text())[name] == [[0] * RANKS]
    assert distance(several, alone) < 1e-5
    weights, others = (load_file(out / "seed-0" / "model" / "model.safetensors") for out in (several, alone))
    assert max((weights[name] - others[name]).abs().max().item() for name in others) < 1e-4
    written = [sorted(str(path.relative_to(out)) for path in out.rglob("*") if "events" not in path.name)
               for out in (several, alone)]  # fmt: skip
    assert written[0] == written[1] and "results.json" in written[0]
    best = [results(out)["fractions"][0]["seeds"][0]["best"] for out in (several, alone)]
    assert best[0]["epoch"] == best[1]["epoch"]
    resolved = [json.loads((out / "manifest.json").read_text())["resolved"] for out in (several, alone)]
    assert resolved[0] == resolved[1] | {"processes": RANKS}
    losses = [row["loss"] for row in rows(several / "seed-0") if row["split"] == "train"]
    assert len(losses) == 9 and np.ptp(losses) > 0.02


def test_means_of_each_rank_would_differ(tuned) -> None:
    """Negative control: the divisor of a batch is the number of its words on all ranks."""
    assert distance(tuned / "local", tuned / "tagging-alone") > 1e-2


def test_a_signal_to_one_rank_stops_all_and_the_continued_run_has_equal_bits(bert, tasks, tuned) -> None:
    assert json.loads((tuned / "codes.json").read_text())["resumed"] == [[143] * RANKS, [0] * RANKS]
    stopped = tuned / "resumed-stopped"
    assert [path.name for path in (stopped / "seed-0" / "checkpoints").iterdir()] == ["step-00000003"]
    assert bytes_of(tuned / "resumed") == bytes_of(tuned / "pairs")
    shutil.copytree(stopped, tuned / "one")
    assert finetune(bert, tasks["pairs"], tuned / "one", *MORE, "--symmetric", "--dropout", "0.1") == 0
    assert distance(tuned / "one", tuned / "pairs-alone") < 1e-5


def test_other_data_than_that_of_the_first_rank_is_refused(monkeypatch) -> None:
    check_same_on_all_ranks({"data": "1"}, ONE_PROCESS)
    monkeypatch.setattr(World, "first_decides", lambda world, function: function() | {"data": "2"})
    with pytest.raises(UserError, match="differs from that of the first process: data: '2' -> '1'"):
        check_same_on_all_ranks({"data": "1", "labels": ["a"]}, World(1, 2))


def test_the_command_line_trains_several_tasks(bert, tasks, tmp_path) -> None:
    files = {}
    for name in ("pairs", "tagging"):
        given = zip(tasks[name][2::2], tasks[name][3::2], strict=False)  # without the last flag of the pairs, a switch
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text("".join(f"{flag.removeprefix('--custom.')}: {value}\n" for flag, value in given))
    flags = ["--task", ",".join(map(str, files.values()))]
    given = ["finetune", "--model", str(bert), *flags, *MORE, "--epochs", "1", "--seeds", "2"]
    given = last_given([*given, "--out", str(tmp_path / "two")])
    assert run_ranks(command, 2, tmp_path / "ranks", *given) == [0, 0]
    printed = output_of(tmp_path / "ranks")
    assert printed.count("glue.md") == 1 and printed.count("2 x cpu fp32") == 4
    assert "fp32" not in output_of(tmp_path / "ranks", 1)
    assert finetune(bert, flags, tmp_path / "one", *MORE, "--epochs", "1", "--seeds", "2", "--dropout", "0.1") == 0
    for seed in ("seed-0", "seed-1"):
        assert all(distance(tmp_path / "two" / name, tmp_path / "one" / name, seed) < 1e-5 for name in files)
