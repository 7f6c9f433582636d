import errno
import os
import socket

import pytest

from fastbert.errors import UserError
from fastbert.inputs import UnreadableError, input_errors, open_input, read_input, read_text_input


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.yaml").write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\n")
    (tmp_path / "latin.yaml").write_bytes(b"a: b\nc: \xe9\n")
    (tmp_path / "folder").mkdir()
    os.mkfifo("pipe")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    return tmp_path


def test_a_file_is_read(files):
    assert read_text_input("text.yaml") == "a: é\n"
    assert read_input("text.yaml", most=9) == b"\xef\xbb\xbfa: \xc3\xa9\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tex.yaml", "list tex.yaml does not exist; did you mean 'text.yaml'"),
        ("elsewhere", "list elsewhere does not exist; check the path"),
        ("none/text.yaml", "list none/text.yaml does not exist; check the path"),
        ("text.yaml/more", "part of that path is a file"),
        ("folder", "list folder is a folder; give a file"),
        ("pipe", "list pipe is a pipe or a device, not a file; write its content to a file first"),
        ("/dev/zero", "list /dev/zero is a pipe or a device"),
        ("socket", "list socket is a socket or a device, not a file"),
        ("loop", "list loop is a link that leads back to itself"),
        ("x" * 300, "a name in that path is too long"),
        ("a\0b", "is not a path: it contains a zero byte"),
    ],
)
def test_what_cannot_be_read_is_refused(files, path, message):
    with pytest.raises(UserError) as refused:
        open_input(path, "list")
    assert message in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(("number", "damaged"), [(errno.EIO, True), (errno.ESTALE, False), (errno.EACCES, False)])
def test_only_damage_lets_a_file_be_replaced(number, damaged):
    with pytest.raises(UserError) as refused, input_errors("x"):
        raise OSError(number, os.strerror(number))
    assert isinstance(refused.value, UnreadableError) != damaged


def test_a_file_read_whole_has_a_limit(files):
    with pytest.raises(UserError, match=r"text\.yaml has more than 8 bytes"):
        read_input("text.yaml", most=8)


def test_text_is_utf8(files):
    with pytest.raises(UserError, match=r"latin.yaml is not UTF-8 text \(byte 0xe9, line 2\)"):
        read_text_input("latin.yaml")


def test_no_descriptor_stays_open(files):
    before = os.listdir("/proc/self/fd")
    for path in ("folder", "pipe", "/dev/zero"):
        with pytest.raises(UserError):
            open_input(path)
    assert os.listdir("/proc/self/fd") == before
