"""The records of a run, its progress, TensorBoard, and plots of its curves."""

import io
import json
import math
import os
import re
import signal
import sys
import time

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from fastbert import progress as progress_module
from fastbert.errors import UserError
from fastbert.progress import progress
from fastbert.streams import echo
from fastbert.training import logbook
from fastbert.training.callbacks import Callback
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import Logbook, plot_curves, read_metrics

pytestmark = pytest.mark.figures

TRAIN = {"loss": 5.4321, "lr": 9.1e-4, "tokens_per_second": 12345.6, "mfu": 0.412}


@pytest.fixture
def clock(monkeypatch):
    """A clock for the logbook, set by hand in seconds."""
    now = [0.0]
    monkeypatch.setattr(logbook.time, "monotonic", lambda: now[0])
    return now


def fill(folder, steps, **options):
    with Logbook(folder, 100, quiet=True, **options) as book:
        for step in steps:
            book.log(step, "train", {"loss": 10.0 - step})


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_records_are_lines_of_json_written_at_once(tmp_path):
    book = Logbook(tmp_path / "run", 100, quiet=True)
    book.log(10, "train", TRAIN)
    book.log(20, "validation", {"loss": 5.0, "accuracy": 0.25, "note": "x", "done": True})
    assert [json.loads(line) for line in lines(tmp_path / "run")] == [
        {"step": 10, "split": "train", **TRAIN},
        {"step": 20, "split": "validation", "loss": 5.0, "accuracy": 0.25, "note": "x", "done": True},
    ]
    book.close()
    book.close()


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with Logbook(tmp_path, 100, quiet=True) as book:
        book.log(1, "train", {"loss": math.nan, "lr": math.inf, "mfu": -math.inf, "ok": 1.0})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    (record,) = (json.loads(line, parse_constant=refuse) for line in lines(tmp_path))
    assert record == {"step": 1, "split": "train", "loss": None, "lr": None, "mfu": None, "ok": 1.0}


def test_resume_drops_later_and_cut_records(tmp_path):
    fill(tmp_path, range(1, 9))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "split": "tr')  # a crash while writing
    fill(tmp_path, [6, 7], start_step=5)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert all(json.loads(line) for line in lines(tmp_path))
    fill(tmp_path, [1])
    assert len(lines(tmp_path)) == 1  # a run from 0 starts empty


def test_changed_records_are_reported(tmp_path, capsys):
    def resumed(content, expected):
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(content))
        capsys.readouterr()
        with Logbook(tmp_path, 100, start_step=5, quiet=True, expected=expected) as book:
            assert book.tally()["records"] == len(read_metrics(tmp_path / "metrics.jsonl"))
        return capsys.readouterr().err

    with Logbook(tmp_path, 100, quiet=True) as book:
        tallies = []
        for step in range(1, 9):
            book.log(step, "train", {"loss": 10.0 - step, "note": "\u2028"})
            tallies.append(book.tally())
    whole, logged = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True), tallies[4]
    for later in ([], whole[5:], [*whole[5:], b'{"step": 9, "sp']):  # what a killed run left after its checkpoint
        assert resumed(whole[:5] + later, logged) == ""
    assert resumed([*whole[:4], whole[4].rstrip()], logged) == ""  # all of it is there
    assert "changed: lines among 1 to 5" in resumed([whole[0].replace(b"9", b"7"), *whole[1:]], logged)
    missing = "missing: 1 of 5 records, by the steps: train after line 2 (step 2)"
    assert missing in resumed(whole[:2] + whole[3:], logged)
    assert "missing: 2 of 5 records, by the steps: train after line 3 (step 3)" in resumed(whole[:3], logged)
    assert "missing: 5 of 5 records" in resumed([], logged)
    assert "damaged: lines 1, 3; missing: 2 of 5" in resumed([b"\xff\n", whole[1], b"[]\n", *whole[3:]], logged)
    assert "repeated: line 2" in resumed([whole[0], *whole], logged)
    # Without a tally in the checkpoint, only visible damage is reported.
    assert resumed(whole, None) == "" and "damaged: line 2." in resumed([whole[0], b"{\n", *whole[2:]], None)


def test_rewriting_is_atomic(tmp_path, monkeypatch):
    fill(tmp_path, range(1, 9))
    before = lines(tmp_path)

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        Logbook(tmp_path, 100, start_step=5, quiet=True)
    assert lines(tmp_path) == before


def test_sync_reaches_the_disk(tmp_path, monkeypatch):
    synced = []
    book = Logbook(tmp_path, 100, quiet=True)
    monkeypatch.setattr(os, "fsync", synced.append)
    book.sync()
    assert len(synced) == 1
    monkeypatch.undo()
    book.close()


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="part of that path is a file"):
        Logbook(tmp_path / "run", 100)


def test_plain_lines_without_a_terminal(tmp_path, capsys, clock):
    """Each step counts, though only every hundredth is logged: at most a line in five seconds, and the last."""
    with Logbook(tmp_path, 3000) as book:
        for step in range(1, 3001):
            clock[0] = step / 64
            book.advance(step, loss=9.0)
            if step % 100 == 0:
                book.log(step, "train", TRAIN)
            if step == 1200:
                book.log(step, "validation", {"loss": 5.5, "accuracy": 0.1234567})
    written = capsys.readouterr().err.splitlines()
    assert "step 1200/3000  validation  loss 5.5  accuracy 0.1235" in written
    written.remove("step 1200/3000  validation  loss 5.5  accuracy 0.1235")
    assert [line.split()[1] for line in written] == [f"{step}/3000" for step in (*range(1, 3000, 320), 3000)]
    assert written[0] == "step 1/3000  0:47 left  loss 9.000"
    assert written[2] == "step 641/3000  0:37 left  loss 5.432  lr 9.1e-04  12.3k tokens/s  MFU 41 %"


@pytest.mark.parametrize(("seconds", "text"), [(1, "0:01"), (9.4, "0:09"), (151, "2:31"), (3600 + 62, "1:01:02")])
def test_time_left(tmp_path, capsys, clock, seconds, text):
    with Logbook(tmp_path, 3000, start_step=1000) as book:
        clock[0] = seconds  # 1000 of 2000 steps took this long
        book.log(2000, "train", {"loss": 1.0})
    assert capsys.readouterr().err == f"step 2000/3000  {text} left  loss 1.000\n"


def test_time_left_counts_validations_and_checkpoints_separately(tmp_path, capsys, clock):
    """Their time does not count for steps, and their mean is expected for the rest."""
    with Logbook(tmp_path, 100) as book:
        for step in range(1, 56):
            clock[0] += 1
            book.advance(step)
            if step == 50:
                with progress("validating"):
                    clock[0] += 60
    written = re.findall(r"step (1|46|51)/100  (.*) left", capsys.readouterr().err)
    assert written == [("1", "1:39"), ("46", "0:54"), ("51", "1:47")]  # 49 (1 + 60 / 51)


def test_unknown_figures_do_not_stop_the_progress(tmp_path, capsys):
    with Logbook(tmp_path, 3000) as book:
        book.advance(1, loss=None)
        book.log(3000, "train", {"loss": math.nan, "lr": None, "tokens_per_second": 2.5e6, "mfu": None})
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("left") and last.endswith("loss nan  lr nan  2.5M tokens/s")


def test_quiet_shows_warnings_but_no_progress(tmp_path, capsys):
    fill(tmp_path, range(1, 9))
    (tmp_path / "metrics.jsonl").write_text("[]\n" + (tmp_path / "metrics.jsonl").read_text())
    with Logbook(tmp_path, 100, start_step=5, quiet=True) as book:
        book.advance(6)
        book.log(6, "train", TRAIN)
        book.log(6, "validation", TRAIN)
    output = capsys.readouterr()
    assert output.out == "" and "damaged: line 1" in output.err and output.err.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def as_terminal(monkeypatch, columns):
    """Standard error as a terminal that is redrawn often. Not a fixture: pytest restores its stream before the test."""
    screen = Terminal()
    for name, value in {"TERM": "xterm", "COLUMNS": str(columns), "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_FRAMES", 0.005)
    monkeypatch.setattr(progress_module, "DELAY", 0.0)
    return screen


def wait_for(screen, text):
    end = time.perf_counter() + 10
    while text not in screen.getvalue():
        assert time.perf_counter() < end, screen.getvalue()
        time.sleep(0.002)


def test_bar_on_a_terminal(tmp_path, monkeypatch, clock):
    """It starts where the run does, moves with every step, and messages appear above it, whole."""
    terminal = as_terminal(monkeypatch, 140)
    with Logbook(tmp_path, 3000, start_step=600) as book:
        clock[0] = 7
        wait_for(terminal, "step 600/3000  first step 0:07")
        clock[0] = 10
        book.advance(601, loss=9.87654)
        wait_for(terminal, "step 601/3000  6:39:50 left  loss 9.877")
        book.log(1200, "train", TRAIN)
        wait_for(terminal, "step 1200/3000  0:30 left  loss 5.432  lr 9.1e-04  12.3k tokens/s  MFU 41 %")
        assert f"training {'━' * 9}" in terminal.getvalue().rpartition("\n")[2]
        echo("a message [with brackets] " + 130 * "x")
        book.log(1200, "validation", {"loss": 5.5})
        with progress("validating", 8, "sequences") as work:
            work.update(3)
            wait_for(terminal, "38% of 8 sequences")
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
            wait_for(terminal, "stopping after this step (Ctrl-C again: at once)  step 1200/3000")
    written = terminal.getvalue()
    assert "a message [with brackets] " + 130 * "x" + "\n" in written  # not broken, not read as markup
    assert "step 1200/3000  validation  loss 5.5\n" in written
    assert written.endswith("\x1b[?25h")  # the cursor is shown again


def test_bar_on_a_narrow_terminal(tmp_path, monkeypatch, clock):
    """A longer line would be wrapped by the terminal, and no longer be redrawn where it was; there is room for ^C."""
    terminal = as_terminal(monkeypatch, 40)
    with Logbook(tmp_path, 3000) as book:
        clock[0] = 1
        book.advance(1200, loss=1.0)
        book.log(1200, "train", TRAIN)
        wait_for(terminal, "step 1200/3000  0:02")
    lines = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "\r", terminal.getvalue()).replace("\n", "\r").split("\r")
    assert max(map(len, lines)) <= 37 and "\x1b[1A" not in terminal.getvalue()  # nor are there two lines


def scalars(folder, tag):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_the_values_and_drops_repeated_steps(tmp_path):
    fill(tmp_path, [0, 1, 3, 4])  # killed before its first checkpoint, so repeated from the start
    fill(tmp_path, range(9))
    assert scalars(tmp_path, "loss/train") == [(step, 10.0 - step) for step in range(9)]
    with Logbook(tmp_path, 100, start_step=5, quiet=True) as book:
        book.log(6, "train", {"loss": 0.5, "word": "left out", "flag": True})
        book.log(7, "validation", {"loss": math.nan})
    assert scalars(tmp_path, "loss/train") == [(step, 10.0 - step) for step in range(6)] + [(6, 0.5)]
    ((step, value),) = scalars(tmp_path, "loss/validation")
    assert step == 7 and math.isnan(value)


def test_callbacks_are_flushed_before_a_checkpoint(tmp_path):
    """TensorBoard's queue, for instance, is written every two minutes otherwise."""

    class Flushed(Callback):
        calls = 0

        def flush(self):
            self.calls += 1

    with Logbook(tmp_path, 100, quiet=True, callbacks=[followed := Flushed()]) as book:
        book.log(5, "train", {"loss": 3.0})
        assert followed.calls == 0
        book.sync()
        assert followed.calls == 1


def test_tensorboard_lists_a_run_by_its_folder_with_options_and_last_values(tmp_path):
    """Read by TensorBoard's own table of hyperparameters; a resumed run is one row, an unfinished one is no success."""
    base = {"learning_rate": 1e-3, "objective": "mlm", "tied": True, "init_from": None, "stages": [1, 2]}
    for name, options, start, loss in (
        ("base", base, 0, 6),
        ("base", base, 50, 5),
        ("half", {"learning_rate": 1}, 0, 7),
    ):
        with Logbook(tmp_path / name, 100, start_step=start, options=options, quiet=True) as book:
            book.log(start + 50, "validation", {"loss": loss, "accuracy": 0.25})
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    statuses = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=9, allowed_statuses=statuses)
    rows = Handler(RequestContext(), Context(TBContext(data_provider=provider)), "", request).run().session_groups
    found = {row.sessions[0].name: row for row in rows}
    assert found.keys() == {"base", "half"}
    shown = {name: value.number_value or value.string_value for name, value in found["base"].hparams.items()}
    assert shown == {**base, "tied": "true", "init_from": "null", "stages": "[1, 2]"}
    values = {metric.name.tag: metric.value for metric in found["base"].sessions[0].metric_values}
    assert values == {"loss/validation": 5.0, "accuracy/validation": 0.25}
    assert [found[name].sessions[0].status for name in ("base", "half")] == statuses


def test_without_tensorboard_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Logbook(tmp_path, 100, quiet=True) as book:
        book.log(1, "train", TRAIN)
        book.log(2, "train", TRAIN)
        book.sync()
    assert capsys.readouterr().err.count("tensorboard is not installed") == 1
    assert len(lines(tmp_path)) == 2


def test_without_rich_plain_lines(tmp_path, monkeypatch):
    terminal = as_terminal(monkeypatch, 140)
    monkeypatch.setattr(progress_module, "find_spec", lambda name: None)
    with Logbook(tmp_path, 100) as book:
        book.log(100, "train", TRAIN)
    assert terminal.getvalue().startswith("step 100/100  ") and "\x1b" not in terminal.getvalue()


def write_curves(folder, accuracy):
    with Logbook(folder, 300, quiet=True) as book:
        for step in range(1, 301):
            book.log(step, "train", {"loss": math.nan if step == 50 else 4 + 6 / step})
            if step % 50 == 0:
                book.log(step, "validation", {"loss": 4.1 + 6 / step} | ({"accuracy": step / 1000} if accuracy else {}))
    return folder / "metrics.jsonl"


@pytest.mark.parametrize("accuracy", [True, False])
def test_curves(tmp_path, monkeypatch, accuracy):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: (figures.append(self), save(self, *a, **o)))
    plot_curves(write_curves(tmp_path, accuracy), tmp_path / "report" / "c.png", title="tiny", baseline=6.5)
    with Image.open(tmp_path / "report" / "c.png") as image:
        assert image.format == "PNG" and np.asarray(image).std() > 0
    panels = figures[0].axes
    assert len(panels) == 1 + accuracy and panels[0].get_title(loc="left") == "tiny"
    raw, smooth, validation, baseline = panels[0].lines
    assert len(raw.get_xdata()) == 299 and 50 not in raw.get_xdata()
    assert np.allclose(smooth.get_ydata()[20:], raw.get_ydata()[20:], atol=0.05)
    assert list(validation.get_xdata()) == [50, 100, 150, 200, 250, 300]
    assert set(baseline.get_ydata()) == {6.5} and baseline.get_linestyle() == ":"
    if accuracy:
        assert np.allclose(panels[1].lines[0].get_ydata(), [5, 10, 15, 20, 25, 30])


def test_smoothing_keeps_lines_and_lowers_noise():
    line = tuple(float(index) for index in range(400))
    assert logbook.smoothed(line)[:390] == pytest.approx(line[:390])
    noise = tuple(np.random.default_rng(0).normal(size=2000))
    assert np.std(logbook.smoothed(noise)) < 0.2
    assert logbook.smoothed((3.0,)) == [3.0]


def test_no_loss_to_plot(tmp_path):
    with pytest.raises(UserError, match=r"no loss to plot in .*none\.jsonl"):
        plot_curves(tmp_path / "none.jsonl", tmp_path / "c.png", title="")
