"""Standard streams that are closed, full, without a reader or of an encoding that lacks characters; Ctrl-C."""

import ast
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastbert.cli import main
from fastbert.streams import _Dropping
from fastbert.studies.engine.job_queue import JobQueue
from fastbert.studies.engine.local import run_local
from tests.processes import in_child
from tests.studies.conftest import toy_job, workers_of
from tests.studies.test_ends import wait_for

ROOT = Path(__file__).parents[1]


def run(job: str, *arguments: str, **streams) -> subprocess.CompletedProcess:
    """`fastbert export`, with the lines `job` for a job, in a process whose streams are as in `streams`."""
    code = textwrap.dedent("""
        import os, sys
        from fastbert import cli
        from fastbert.errors import UserError
        def job(arguments):
            {}
        cli.JOBS["export"] = (job, "")
        sys.exit(cli.main(sys.argv[1:]))
    """).format(textwrap.indent(textwrap.dedent(job), " " * 4).strip())
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([sys.executable, "-c", code, *(arguments or ("export",))], **given)


def closed() -> int:
    """The writing end of a pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    return write


PRINTING = "print('usage' * 5000); raise SystemExit(0)"  # as argparse ends after a help
WRITING = """
    from fastbert.outputs import output_file
    with output_file("/dev/stdout", "w") as file:
        file.write("page" * 50000)
"""


@pytest.mark.parametrize(
    ("arguments", "job"),
    [(["--help"], PRINTING), (["export"], PRINTING), (["pretrain", "--help"], PRINTING), (["export"], WRITING)],
)
def test_a_reader_that_went_away(arguments: list[str], job: str) -> None:
    write = closed()
    done = run(job, *arguments, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(("arguments", "job"), [(["--help"], PRINTING), (["export"], PRINTING), (["export"], WRITING)])
def test_standard_output_on_a_full_disk(arguments: list[str], job: str) -> None:
    with open("/dev/full", "w") as full:
        done = run(job, *arguments, stdout=full)
    assert done.returncode == 2
    assert done.stderr == b"error: the disk is full while writing standard output; free space\n"


def test_closed_streams_take_no_file(tmp_path) -> None:
    """What is printed must not go into the next file that is opened."""
    job = f"""
        with open({str(tmp_path / "f")!r}, "w") as file:
            os.write(1, b"lost"); os.write(2, b"lost"); print("lost"); print("lost", file=sys.stderr)
            assert os.read(0, 1) == b"" and sys.stdin.read() == ""
            assert all(map(os.get_inheritable, range(3)))
            file.write("whole")
        return 0
    """
    assert run(job, preexec_fn=lambda: [os.close(number) for number in range(3)]).returncode == 0
    assert (tmp_path / "f").read_text() == "whole"


@pytest.mark.parametrize(("ending", "code"), [("return 0", 0), ("raise UserError('so')", 2), ("1 // 0", 1)])
@pytest.mark.parametrize("stream", ["full", "no reader"])
def test_a_job_continues_without_its_messages(tmp_path, stream: str, ending: str, code: int) -> None:
    job = f"""
        for _ in range(3): print("step", "x" * 10000, file=sys.stderr, flush=True)
        sys.stderr.write("no line end")
        open({str(tmp_path / "result")!r}, "w").close()
        {ending}
    """
    target = os.open("/dev/full", os.O_WRONLY) if stream == "full" else closed()
    done = run(job, stderr=target)
    os.close(target)
    assert done.returncode == code
    assert (tmp_path / "result").exists()


def test_a_pipe_that_is_full_and_does_not_wait_drops_the_rest() -> None:
    def write() -> None:
        signal.alarm(10)
        _, end = os.pipe()
        os.set_blocking(end, False)
        assert _Dropping(end, "w").write(bytes(10**6)) == 10**6

    assert in_child(write) == 0


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}],
)
def test_any_encoding_takes_any_name(environment: dict[str, str]) -> None:
    job = r"print('\u2192 Gr\xf6\xdfe', os.fsdecode(b'\xff')); raise UserError('\u2502 \xfc')"
    done = run(job, env={**os.environ, **environment})
    assert done.returncode == 2
    assert done.stdout.endswith(b" \\udcff\n") and (b"\\u2192" in done.stdout or "→ Größe".encode() in done.stdout)
    assert done.stderr.startswith(b"error: ")


def test_names_that_are_no_text_are_refused() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name, more in ((b"r\xff", {}), ("\xfc".encode(), {"env": environment})):
        done = run("1 // 0", "export", name, **more)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
        assert b"is not text in the encoding of this locale" in done.stderr and b"LC_ALL=C.UTF-8" in done.stderr
    assert run("return 0", "export", "\xfc").returncode == 0


def test_names_in_messages_command_no_terminal(tmp_path, capsys) -> None:
    """Warnings and remarks show control characters of names as escapes, with a bar or a table on the screen too."""
    source = tmp_path / "a\x1b]0;b\nerror: c\x07.txt"
    source.write_text('{"text": "a text"}\n\n{"text": "another text"}\n\n{"text": "a third text"}\n')
    arguments = ["prepare", "--source", str(tmp_path / "a*.txt"), "--out", str(tmp_path / "out"), "--vocab-size"]
    for _ in range(2):
        assert main([*arguments, "300", "--workers", "1"]) == 0
    printed = capsys.readouterr().err
    assert "a\\x1b]0;b\\nerror: c\\x07.txt looks like JSON" in printed
    assert not set("\x1b\x07") & set(printed)


def test_all_messages_are_printed_by_one_function() -> None:
    printing = {
        str(path.relative_to(ROOT / "fastbert"))
        for path in (ROOT / "fastbert").rglob("*.py")
        if re.search(r"file=sys\.stderr|sys\.stderr\.write\(", path.read_text(encoding="utf-8"))
    }
    assert printing == {"streams.py", "cli.py", "__init__.py"}  # cli: the error that ends the call


def test_lines_on_standard_error_are_written_at_once() -> None:
    """Else those of several processes would mix within a line."""
    done = run(
        "import io; sys.stderr.buffer.write = lambda data: done.append(bytes(data)) or len(data)\n"
        "done = []; print('a', 'b', file=sys.stderr); assert done == [b'a b\\n'], done; return 0"
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_every_text_file_has_an_encoding() -> None:
    """The locale's must not decide how a file is read or written."""
    bad = []
    for path in sorted(path for name in ("fastbert", "kernels", "scripts") for path in (ROOT / name).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if re.search(r"open\(|_text\(", text) else ():
            if isinstance(node, ast.Call) and _is_text(node) and "encoding" not in {word.arg for word in node.keywords}:
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert not bad


def _is_text(call: ast.Call) -> bool:
    """Whether `call` opens, reads or writes a file as text."""
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if is_method else getattr(call.func, "id", None)
    if name in ("read_text", "write_text"):
        return is_method
    if name not in ("open", "fdopen") or ast.unparse(call.func) in ("os.open", "archive.open", "tarfile.open"):
        return False
    modes = [word.value for word in call.keywords if word.arg == "mode"] + call.args
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    return not any("b" in text and len(text) < 4 for text in texts)


# --- Ctrl-C


def test_ctrl_c_does_not_reach_spawned_processes() -> None:
    """The first one starts multiprocessing's resource tracker, so this needs a process without one."""
    done = run(
        "import multiprocessing, signal\n"
        "from fastbert.processes import without_control_c\n"
        "process = multiprocessing.get_context('spawn').Process(target=signal.raise_signal, args=(signal.SIGINT,))\n"
        "with without_control_c(): process.start()\n"
        "process.join(); assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "return process.exitcode"
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_does_not_reach_the_workers_of_a_study(tmp_path) -> None:
    events = run_local(JobQueue([toy_job("a")]), 1, 1, tmp_path)
    next(events)
    wait_for(lambda: workers_of(os.getpid()))
    (worker,) = workers_of(os.getpid())
    status = Path(f"/proc/{worker}/status").read_text()
    events.close()
    blocked = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    assert int(blocked, 16) >> signal.SIGINT - 1 & 1


def test_all_child_processes_are_started_so() -> None:
    """Or in a session of their own, which a terminal's Ctrl-C does not reach."""
    for path in (ROOT / "fastbert").rglob("*.py"):
        text = path.read_text()
        if any(f"{start}(" in text for start in ("Popen", "ProcessPoolExecutor", "context.Process")):
            assert "with without_control_c(" in text or "start_new_session=True" in text, path
