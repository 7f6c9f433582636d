"""Signals are recorded for the loop, the second Ctrl-C stops at once, and the previous handlers are restored."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from fastbert.training.interrupts import Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_sets_the_flag(number, code):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        assert interrupts.caught is None and interrupts.exit_code == 0
        os.kill(os.getpid(), number)
        assert interrupts.caught == number and interrupts.exit_code == code
    assert signal.getsignal(number) == before


def test_second_control_c_raises_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.caught == signal.SIGTERM  # the first one
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with Interrupts() as interrupts:
            seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
            seen.append(interrupts.exit_code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, 0]


def test_exit_code_of_a_process():
    code = (
        "import os, signal, sys\n"
        "from fastbert.training.interrupts import Interrupts\n"
        "with Interrupts() as interrupts:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sys.exit(interrupts.exit_code)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 143


def test_several_processes_stop_when_the_sums_say_so() -> None:
    """A signal to one of them is not acted upon before all know of it."""
    with Interrupts(several=True) as hit, Interrupts(several=True) as other:
        assert hit.flags == {"SIGTERM": 0.0, "SIGINT": 0.0}
        hit._catch(signal.SIGTERM, None)
        assert hit.caught is None and hit.flags == {"SIGTERM": 1.0, "SIGINT": 0.0}
        sums = {name: hit.flags[name] + other.flags[name] for name in hit.flags} | {"loss": 2.0}
        for one in (hit, other):
            one.agree(sums)
            assert one.caught is signal.SIGTERM and one.exit_code == 143
    alone = Interrupts()
    alone.agree({"SIGTERM": 1.0})
    assert alone.flags == {} and alone.caught is None
