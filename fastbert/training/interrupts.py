"""Signals that stop a run between two steps, with a checkpoint and the signal's exit code."""

import signal
import threading
from types import FrameType

from fastbert.progress import notify


class Interrupts:
    """Catches SIGTERM and SIGINT in a `with` block; the loop reads `caught` between steps.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python cannot install handlers,
    nothing is caught.

    Attributes:
        caught: the first signal received, or None.
    """

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._control_c = 0
        self._before: dict[signal.Signals, object] = {}

    @property
    def exit_code(self) -> int:
        """0 without a signal, 143 after SIGTERM, 130 after SIGINT."""
        return 128 + self.caught if self.caught is not None else 0

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            # None: the handler was not installed by Python, which cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught is None:
            self.caught = signal.Signals(number)
            notify("stopping after this step (Ctrl-C again: at once)")
        if number == signal.SIGINT:
            self._control_c += 1
            if self._control_c > 1:
                raise KeyboardInterrupt
