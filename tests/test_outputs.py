"""Links, devices, mount points and folders that are there stay what they are, also on a full disk."""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastbert import outputs
from fastbert.data import note_index, partial
from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.errors import UserError
from fastbert.files import atomic_file, atomic_folder, disk_errors, locked_folder
from fastbert.outputs import check_output_file, check_output_folder, output_file, output_folder
from tests.processes import in_child, killed_before, kills, reading


def write(path: Path | str, text: str = "new") -> None:
    check_output_file(path)
    with output_file(path, "w") as file:
        file.write(text)


# --- files


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_has_the_text(tmp_path, there: bool) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    if there:
        target.write_text("old")
    (tmp_path / "between").symlink_to("far/target")
    link.symlink_to("between")
    with pytest.raises(ZeroDivisionError), output_file(link, "w") as file:
        file.write("half")
        raise ZeroDivisionError
    assert target.read_text() == "old" if there else not target.exists()
    write(link)
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert link.is_symlink() and (tmp_path / "between").is_symlink()
    assert target.read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["target"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_fifo_is_written_into(tmp_path, linked: bool) -> None:
    fifo = out = tmp_path / "fifo"
    if linked:
        out = tmp_path / "link"
        out.symlink_to(fifo)
    with reading(fifo) as got:
        write(out, "new\n" * 50_000)
    assert got == [b"new\n" * 50_000] and fifo.is_fifo() and out.is_symlink() == linked


def test_a_character_device_is_written_into(tmp_path) -> None:
    ours, theirs = os.openpty()  # where nobody, root included, can replace it
    device, link = os.ttyname(theirs), tmp_path / "link"
    link.symlink_to(device)
    for out in (device, link):
        write(out, "new\n")
        assert os.read(ours, 100) == b"new\r\n"
    assert link.is_symlink() and Path(device).is_char_device()


def test_a_device_that_is_full(tmp_path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)  # not by its name, which a bug here would replace
    with pytest.raises(UserError, match="the disk is full while writing /dev/fd/"):
        write(f"/dev/fd/{full}")
    os.close(full)


def test_an_open_descriptor_keeps_its_offset(tmp_path) -> None:
    """As where standard output is a file: what was printed before and after stays."""
    path = tmp_path / "printed"
    with open(path, "w") as file:
        file.write("before\n")
        file.flush()
        write(f"/dev/fd/{file.fileno()}", "new\n")
        link = tmp_path / "link"
        link.symlink_to(f"/proc/self/fd/{file.fileno()}")
        write(link, "again\n")
        file.write("after\n")
    assert path.read_text() == "before\nnew\nagain\nafter\n"
    with open(path) as file, pytest.raises(UserError, match="open for reading only"):
        write(f"/dev/fd/{file.fileno()}")
    with pytest.raises(UserError, match="no open descriptor 987"):
        write("/dev/fd/987")


def test_what_is_no_file_is_refused(tmp_path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        with pytest.raises(UserError, match="is a socket"):
            check_output_file(tmp_path / "socket")
        with pytest.raises(UserError, match="neither a file nor a folder"), atomic_file(tmp_path / "socket"):
            pass
    with pytest.raises(UserError, match="is a folder"):
        check_output_file(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop"):
        check_output_file(tmp_path / "loop")
    for name, what in (("socket/x", "is a file"), ("x" * 256, "too long"), ("a/" + "x" * 256 + "/b", "too long")):
        for check in (check_output_file, check_output_folder):
            with pytest.raises(UserError, match=what):
                check(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"socket", "loop"}


def test_a_name_of_any_length_the_disk_takes(tmp_path) -> None:
    for name in ("x" * 255, "ü" * 127):
        write(tmp_path / name)
        with output_folder(tmp_path / "folder" / name, "a", "b"):
            pass
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_is_a_mount_point_is_overwritten(tmp_path, monkeypatch) -> None:
    out, content = tmp_path / "out", tmp_path / "content"
    out.touch()
    content.write_text("old and longer")
    mounted = subprocess.run(["mount", "--bind", content, out], capture_output=True).returncode == 0
    if not mounted:  # not permitted here
        out.write_text("old and longer")
        monkeypatch.setattr(os, "replace", busy)
    try:
        write(out)
        assert out.read_text() == "new"
        assert not mounted or content.read_text() == "new"
    finally:
        if mounted:
            subprocess.run(["umount", out], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "content"}


def busy(*_: object) -> None:
    raise OSError(errno.EBUSY, "Device or resource busy")


# --- folders


@contextmanager
def volume(folder: Path, size: str = "16m"):
    """A mounted file system; where none can be mounted, a folder that behaves so."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    with pytest.MonkeyPatch.context() as patch:
        rename, rmdir = os.rename, os.rmdir
        patch.setattr(outputs, "is_mount", lambda path: path == folder)
        patch.setattr(os, "rename", lambda a, b: busy() if folder in (Path(a), Path(b)) else rename(a, b))
        patch.setattr(os, "rmdir", lambda a, **more: busy() if Path(a) == folder else rmdir(a, **more))
        yield


def filled(path: Path, text: str = "new") -> None:
    """Writes a folder of two files and a folder, as an export is written."""
    with output_folder(path, first="first", last="last") as folder:
        (folder / "inner").mkdir()
        for name in ("a", "inner/b", "first", "last"):
            (folder / name).write_text(text)


def read(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


WHOLE = {name: "new" for name in ("a", "inner/b", "first", "last")}
OLD = {name: "old" for name in (*WHOLE, "more")}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("location", ["working directory", "mount point", "empty", "link", "link to nothing", "other"])
def test_a_folder_stays_the_folder_it_is(tmp_path, monkeypatch, location: str, older: bool) -> None:
    real = out = tmp_path / "real"
    if location != "link to nothing" and location != "other":
        real.mkdir()
    if location.startswith("link"):
        out = tmp_path / "link"
        out.symlink_to("real")
    if location == "working directory":
        monkeypatch.chdir(real)
        out = Path()
    with volume(real) if location == "mount point" else open(os.devnull):
        before = real.stat().st_ino if real.exists() else None
        if older:
            filled(out, "old")
            (real / "more").write_text("old")
        filled(out)
        assert read(real) == WHOLE
        if before and not (older and location in ("empty", "link")):
            assert real.stat().st_ino == before
        assert out.is_symlink() == location.startswith("link")
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_a_link_to_nothing_as_the_folder_of_a_run(tmp_path) -> None:
    link = tmp_path / "link"
    link.symlink_to("far/real")
    with locked_folder(link):
        pass
    assert os.listdir(tmp_path) == ["link"]
    with locked_folder(link):
        (link / "written").touch()
    assert link.is_symlink() and (tmp_path / "far" / "real" / "written").exists()


@pytest.mark.parametrize("write", [atomic_file, atomic_folder, lambda path: output_folder(path, "a", "b")])
def test_folders_made_for_what_failed_are_removed(tmp_path, write) -> None:
    with pytest.raises(ZeroDivisionError), write(tmp_path / "a" / "b" / "c"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 256, "x" * 256 + "/c", "nothing/../c"])
def test_folders_made_above_one_that_cannot_be_are_removed(tmp_path, name: str) -> None:
    with pytest.raises(UserError), locked_folder(tmp_path / "a" / "b" / name):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("older", [False, True])
def test_killed_while_a_folder_is_filled_from_within(tmp_path, monkeypatch, older: bool) -> None:
    """Without its last file unless it is whole, recognized by its first, and filled by the next call."""
    out = tmp_path / "out"
    monkeypatch.setattr(outputs, "is_mount", lambda path: path == out)

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name in OLD if older else ():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("old")

    begin()
    count = 0
    for _ in kills(lambda: filled(out), out):
        found = {name: text for name, text in read(out).items() if not name.startswith(".")}
        assert found in (OLD if older else {}, WHOLE) or "last" not in found
        assert not found or "first" in found
        filled(out)
        assert read(out) == WHOLE
        begin()
        count += 1
    assert count > 10


def test_prepare_into_a_mounted_volume(corpus, prepared, tmp_path) -> None:
    out = tmp_path / "volume"
    with volume(out):
        (out / "lost+found").mkdir()
        options = PrepareOptions(str(corpus), str(out), vocab_size=600, validation_fraction=0.1, workers=1)
        prepare(options)
        (out / "lost+found").rmdir()
        assert {name.name for name in out.iterdir()} == {name.name for name in prepared.iterdir()} - {note_index.FOLDER}
        for file in prepared.rglob("*"):  # other tests write an index of notes into it
            assert (
                file.is_dir()
                or note_index.FOLDER in file.parts
                or (out / file.relative_to(prepared)).read_bytes() == file.read_bytes()
            )


@pytest.mark.parametrize(("number", "seed"), [(1, 0), (9, 1), (16, 0)])
def test_prepare_killed_while_it_fills_a_folder(corpus, tmp_path, number: int, seed: int) -> None:
    """The next call finishes it, or with other options leaves nothing of it."""
    out = tmp_path / "out"
    options = PrepareOptions(str(corpus), str(out), vocab_size=600, validation_fraction=0.1, workers=1)
    expected = prepare(replace(options, out=str(tmp_path / "expected"), seed=seed))
    out.mkdir()

    def killed() -> None:
        move = partial.move_contents

        def moved(*all: object) -> None:
            killed_before(number, out / partial.WITHIN)
            move(*all)

        partial.move_contents = moved
        prepare(options)

    assert in_child(killed) == -signal.SIGKILL
    assert (out / "dataset.json").exists() == (number > 15)
    prepare(replace(options, seed=seed))
    assert read_bytes(out) == read_bytes(expected) and sorted(os.listdir(out)) == sorted(os.listdir(expected))


def test_traces_of_a_prepare_that_was_killed_at_its_end(corpus, prepared, tmp_path) -> None:
    out = Path(shutil.copytree(prepared, tmp_path / "out"))
    (out / partial.WITHIN).mkdir()
    for name in (*partial.INNER, f"{partial.WITHIN}/.lock"):
        (out / name).touch()
    prepare(PrepareOptions(str(corpus), str(out), vocab_size=600, validation_fraction=0.1, workers=1))
    assert sorted(os.listdir(out)) == sorted(os.listdir(prepared))


def read_bytes(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# --- full disks


def test_numpys_short_writes_are_full_disks_or_limits(tmp_path) -> None:
    """numpy reports them without an error number."""
    with pytest.raises(UserError, match="the disk is full while writing x"), disk_errors("x"):
        raise OSError("1250 requested and 624 written")

    def short() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(UserError, match=r"larger than the limit .*writing x"), disk_errors("x"):
            np.save(tmp_path / "array.npy", np.zeros(10_000))
        with pytest.raises(UserError, match="larger than the limit"), atomic_file(tmp_path / "file") as file:
            file.write(bytes(6000))
        assert os.listdir(tmp_path) == ["array.npy"]

    assert in_child(short) == 0


def test_prepare_on_a_disk_that_is_full_and_then_is_not(corpus, tmp_path) -> None:
    """A small mounted disk, or where none can be mounted a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", disk]).returncode == 0
    options = PrepareOptions(str(corpus), str(disk / "out"), vocab_size=600, validation_fraction=0.1, workers=1)

    def full() -> None:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        with pytest.raises(UserError, match=rf"the disk is full|larger than the limit.*{disk}"):
            prepare(options)

    try:
        assert in_child(full) == 0
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        prepare(options)
        assert os.listdir(disk) == ["out"]
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)
