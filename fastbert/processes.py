"""Child processes that ignore Ctrl-C: a terminal sends it to all processes, but the parent stops its children
itself."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def without_control_c(spawned: bool = True) -> Iterator[None]:
    """Blocks SIGINT for processes started in this block, also while they import their modules, when it would stop them
    with a traceback. This process receives it after the block.

    Args:
        spawned: multiprocessing starts the processes; its resource tracker would otherwise unblock the signal.
    """
    if spawned:
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
