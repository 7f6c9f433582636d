"""Child processes that Ctrl-C does not reach: a terminal sends it to all processes, and the parent ends its own."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def without_control_c(spawned: bool = True) -> Iterator[None]:
    """Processes started in this block never see SIGINT, not even while they import their modules, where it would end
    them with a traceback of their own. This process gets it after the block.

    Args:
        spawned: by multiprocessing, whose resource tracker would unblock the signal where the first process starts it.
    """
    if spawned:
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
