"""Checkpoints survive kills, damage and a full disk, and restore every bit."""

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.errors import UserError
from fastbert.records import seal_of
from fastbert.training.checkpoints import Checkpointer, check_space, read_checkpoint
from fastbert.training.finite import NotFiniteError
from tests.stand_ins import free_space


@pytest.fixture
def messages():
    return []


@pytest.fixture
def checkpointer(tmp_path, messages):
    return Checkpointer(tmp_path / "checkpoints", 3, messages.append)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(40, 30, generator=generator), "b": torch.randn(30, generator=generator).bfloat16()},
        "optimizer": {"0.step": torch.tensor(7.0), "ids": torch.arange(5), "flag": torch.tensor([True, False])},
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    for file in left:
        assert left[file].keys() == right[file].keys()
        for name, tensor in left[file].items():
            assert tensor.dtype == right[file][name].dtype and tensor.shape == right[file][name].shape
            raw, other = (t.contiguous().flatten().view(torch.uint8) for t in (tensor, right[file][name]))
            assert torch.equal(raw, other)  # signed zeros included


def test_round_trip_is_exact(checkpointer):
    saved = tensors()
    saved["model"]["odd"] = torch.tensor([3.4e38, -0.0, -3.4e38, 1e-45])
    saved["empty"] = {}
    saved["hollow"] = {"a": torch.zeros(0, 3), "b": torch.zeros(0, 3)}
    state = {"seed": 3, "nested": [1, {"x": 0.1}], "nothing": None, "word": "Übung"}
    path = checkpointer.save(123, saved, state, metric=2.5)
    assert path.name == "step-00000123"
    loaded = checkpointer.load_latest()
    assert (loaded.step, loaded.metric, loaded.path) == (123, 2.5, path)
    assert_same(loaded.tensors, saved)
    assert loaded.state == state
    assert read_checkpoint(path).step == 123


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tensors_that_are_not_finite_are_not_saved(checkpointer, bad):
    """Nor are metrics and state, which are JSON; earlier checkpoints are unchanged."""
    checkpointer.save(1, tensors(), {}, bad)
    before = {path: path.read_bytes() for path in checkpointer.folder.rglob("*") if path.is_file()}
    for group, name in (("model", "b"), ("optimizer", "0.step")):
        broken = tensors()
        broken[group][name].view(-1)[-1] = bad
        with pytest.raises(NotFiniteError, match=f"the state after step 2 holds numbers .*: {group} {name}$"):
            checkpointer.save(2, broken, {})
    with pytest.raises(ValueError, match="JSON"):
        checkpointer.save(2, tensors(), {"loss": bad})
    assert {path: path.read_bytes() for path in checkpointer.folder.rglob("*") if path.is_file()} == before
    assert checkpointer.newest_whole() == checkpointer.paths()[0] and checkpointer.load_latest().metric is None


def test_pruning_can_wait(checkpointer):
    for step in range(1, 8):
        checkpointer.save(step, {}, {}, prune=step < 5)
    assert len(checkpointer.paths()) == 6
    checkpointer.save(8, {}, {})
    assert [path.name[-1] for path in checkpointer.paths()] == ["6", "7", "8"]


def test_shared_and_strided_tensors(checkpointer):
    base = torch.randn(6, 4)
    group = {
        "base": base,
        "tied": base,
        "transposed": base.t(),
        "row": base[2],
        "strided": base[::2, 1:3],
        "lone": torch.randn(9)[3:],
    }
    path = checkpointer.save(1, {"model": group}, {})
    loaded = checkpointer.load_latest().tensors
    assert_same(loaded, {"model": group})
    assert loaded["model"]["tied"] is loaded["model"]["base"]
    stored = safetensors.torch.load_file(path / "model.safetensors")
    assert stored.keys() == group.keys() - {"tied"}


def test_no_checkpoint(checkpointer, tmp_path):
    assert checkpointer.load_latest() is None
    with pytest.raises(UserError, match=r"there is no checkpoint .*step-00000009; those in .*: none"):
        read_checkpoint(tmp_path / "checkpoints" / "step-00000009")


@given(
    metrics=st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan, -math.inf, None]), min_size=1, max_size=8),
    keep_last=st.integers(1, 3),
)
@settings(max_examples=25)
def test_last_and_best_are_retained(tmp_path_factory, metrics, keep_last):
    folder = tmp_path_factory.mktemp("prune")
    checkpointer = Checkpointer(folder, keep_last, print)
    for step, metric in enumerate(metrics):
        checkpointer.save(step, {}, {}, metric)
    retained = {int(path.name[5:]) for path in checkpointer.paths()}
    expected = set(range(len(metrics))[-keep_last:])
    finite = {step: metric for step, metric in enumerate(metrics) if metric is not None and math.isfinite(metric)}
    if finite:
        expected.add(min(finite, key=lambda step: finite[step]))
    assert retained == expected
    assert {path.name for path in folder.iterdir()} == {f"step-{step:08d}" for step in retained}
    shutil.rmtree(folder)


def test_metrics_of_something_else_are_not_compared(tmp_path):
    checkpointer = Checkpointer(tmp_path, 1, print)
    for step, (metric, metric_of) in enumerate([(1.0, "new"), (4.0, "old"), (3.0, "old"), (5.0, "old"), (6.0, "old")]):
        checkpointer.save(step, {}, {}, metric, metric_of)
    assert [path.name for path in checkpointer.paths()] == ["step-00000002", "step-00000004"]
    assert checkpointer.load_latest().metric_of == "old"


@pytest.mark.parametrize("metric", [math.nan, -math.inf])
def test_a_metric_of_an_older_version_is_never_the_best(metric, checkpointer):
    path = checkpointer.save(1, {}, {}, 5.0)
    manifest = json.loads((path / "manifest.json").read_text()) | {"metric": metric}
    (path / "manifest.json").write_text(json.dumps(manifest | {"seal": seal_of(manifest)}))
    assert checkpointer.load_latest().metric is None
    for step in range(2, 6):
        checkpointer.save(step, {}, {}, step)
    assert checkpointer.paths()[0].name == "step-00000002"


def truncate(path):
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 1)


def flip(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.safetensors").write_bytes(content)


def edit_state(path):
    (path / "state.json").write_text((path / "state.json").read_text().replace("200", "201"))


def edit_manifest(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"metric": 0.0}))


@pytest.mark.parametrize(
    ("damage", "file", "what"),
    [
        (truncate, "model.safetensors", "bytes instead of"),
        (flip, "model.safetensors", "SHA-256 does not match"),
        (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors", "is missing"),
        (edit_state, "state.json", "SHA-256 does not match"),
        (lambda path: (path / "state.json").unlink(), "state.json", "is missing"),
        (edit_manifest, "manifest.json", "its hash does not match"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json", "is damaged"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json", "is damaged"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json", "does not exist"),
    ],
    ids=["truncated", "flipped", "deleted", "state edited", "state deleted", "manifest edited", "cut", "list", "gone"],
)
def test_damage_is_reported_and_the_previous_checkpoint_used(checkpointer, messages, damage, file, what):
    for step in (100, 200):
        checkpointer.save(step, tensors(step), {"step": step})
    path = checkpointer.paths()[-1]
    damage(path)
    with pytest.raises(UserError, match="restore the file, or delete") as caught:
        read_checkpoint(path)
    assert str(path / file) in str(caught.value) and what in str(caught.value)
    loaded = checkpointer.load_latest()
    assert loaded.step == 100
    assert_same(loaded.tensors, tensors(100))
    assert len(messages) == 1 and str(path / file) in messages[0] and "; step-00000100 is used" in messages[0]
    damage_all = checkpointer.paths()[0]
    (damage_all / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole.*step-00000200.*step-00000100"):
        checkpointer.load_latest()


def test_every_flipped_bit_is_found(checkpointer):
    """Any single bit, in any file, the manifest included."""
    checkpointer.save(5, {"model": {"w": torch.ones(3)}}, {"a": 1}, metric=1.5)
    path = checkpointer.paths()[0]
    pick = random.Random(0)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for _ in range(40):
            position, bit = pick.randrange(len(content)), pick.randrange(8)
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            file.write_bytes(changed)
            try:
                loaded = read_checkpoint(path)
            except UserError:
                continue
            # White space between the manifest's values may change; what they say may not.
            assert file.name == "manifest.json" and loaded.metric == 1.5 and loaded.step == 5
        file.write_bytes(content)
    assert read_checkpoint(path).step == 5


def test_a_newer_format_and_a_renamed_folder_are_refused(checkpointer, monkeypatch):
    path = checkpointer.save(5, {}, {})
    renamed = path.rename(path.with_name("step-00000006"))
    with pytest.raises(UserError, match="was renamed: it is from step 5"):
        read_checkpoint(renamed)
    monkeypatch.setattr("fastbert.training.checkpoints.FORMAT", 2)
    with pytest.raises(UserError, match="has format 1, but this version of fastbert reads format 2"):
        read_checkpoint(renamed)


def test_damaged_later_checkpoint_does_not_displace_the_new_one(tmp_path, messages):
    checkpointer = Checkpointer(tmp_path, 1, messages.append)
    checkpointer.save(200, tensors(), {})
    (tmp_path / "step-00000200" / "state.json").unlink()
    checkpointer.save(150, tensors(), {})  # the run resumed from an earlier step
    assert checkpointer.load_latest().step == 150
    checkpointer.save(200, tensors(), {})
    assert checkpointer.load_latest().step == 200 and [p.name for p in checkpointer.paths()] == ["step-00000200"]


def save_without_end(folder, reports):
    checkpointer = Checkpointer(folder, 2, print)
    latest = checkpointer.load_latest()
    step = latest.step if latest else 0
    while True:
        step += 1
        group = {"w": torch.full((300, 30), float(step)), "b": torch.full((7,), float(step))}
        # Every other step is saved twice, as an interrupted run may: the second replaces the first.
        for _ in range(1 + step % 2):
            checkpointer.save(step, {"model": group, "optimizer": group}, {"step": step}, metric=-step % 5)
        reports.send(step)


def test_killed_saves_lose_nothing(tmp_path):
    """SIGKILL at random moments; afterwards the newest verified checkpoint is at least the last one reported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, not in every child
    pick, interrupted, finished = random.Random(1), 0, 0
    for _ in range(25):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=save_without_end, args=(tmp_path, send), daemon=True)
        process.start()
        send.close()
        finished = receive.recv()
        time.sleep(pick.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while True:
                finished = receive.recv()
        except EOFError:
            pass
        interrupted += any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
        messages = []
        checkpointer = Checkpointer(tmp_path, 2, messages.append)
        loaded = checkpointer.load_latest()
        assert messages == [] and loaded.step >= finished and loaded.state == {"step": loaded.step}
        assert all((t == loaded.step).all() for group in loaded.tensors.values() for t in group.values())
        assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
        assert all(read_checkpoint(path) for path in checkpointer.paths())
    assert interrupted > 3  # several kills hit a save halfway


def test_killed_between_the_two_renames_of_a_replacement(tmp_path):
    checkpointer = Checkpointer(tmp_path, 1, print)
    path = checkpointer.save(7, tensors(), {"which": "old"})
    path.rename(tmp_path / ".step-00000007.999.old.tmp")
    assert Checkpointer(tmp_path, 1, print).load_latest().state == {"which": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_of_safetensors(*arguments, **options):
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("target", "failure"), [("os.fsync", full_disk), ("safetensors.torch.save_file", full_disk_of_safetensors)]
)
def test_full_disk_leaves_older_checkpoints(checkpointer, monkeypatch, tmp_path, target, failure):
    checkpointer.save(1, tensors(1), {})
    monkeypatch.setattr(target, failure)
    with pytest.raises(UserError, match=r"the disk is full.*step-00000002"):
        checkpointer.save(2, tensors(2), {})
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert_same(checkpointer.load_latest().tensors, tensors(1))


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(UserError, match="part of that path is a file"):
            Checkpointer(folder, 1, print)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission to write"):
        Checkpointer(tmp_path / "checkpoints", 1, print)


def test_retaining_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="keep_last is 0"):
        Checkpointer(tmp_path, 0, print)


def test_space_is_checked_before(tmp_path, monkeypatch):
    free_space(monkeypatch, 5_000_000_000)
    check_space(tmp_path / "not" / "yet", 5_000_000_000)
    with pytest.raises(UserError, match=r"need 5\.1 GB and the disk of .*yet has 5\.0 GB left"):
        check_space(tmp_path / "not" / "yet", 5_100_000_000)
    free_space(monkeypatch, 6_000_000)
    with pytest.raises(UserError, match=r"need 7\.0 MB and the disk of .* has 6\.0 MB left"):
        check_space(tmp_path, 7_000_000)


def test_a_path_without_folders():
    with pytest.raises(UserError, match="no folder can be created at /proc/fastbert/checkpoints"):
        Checkpointer("/proc/fastbert/checkpoints", 1, print)


def test_a_name_too_long(tmp_path):
    with pytest.raises(UserError, match="a name in that path is too long"):
        Checkpointer(tmp_path / ("a" * 300), 1, print)
