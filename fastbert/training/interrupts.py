"""Signals that stop a run between two steps, with a checkpoint and the signal's exit code."""

import signal
import threading
from collections.abc import Mapping
from types import FrameType

from fastbert.progress import notify

NUMBERS = (signal.SIGTERM, signal.SIGINT)
_current: "Interrupts | None" = None  # of the `with` block that is running


class Interrupts:
    """Catches SIGTERM and SIGINT in a `with` block; the loop reads `caught` between steps.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python cannot install handlers,
    nothing is caught.

    If several processes train together, all must stop after the same step. So each sends its `flags` with the scalars
    of a step, and `agree` sets `caught` on all of them when their sums arrive.

    Attributes:
        caught: the signal for which the training stops, or None.
    """

    def __init__(self, several: bool = False) -> None:
        """
        Args:
            several: several processes train together.
        """
        self.several, self.caught = several, None
        self._received: signal.Signals | None = None
        self._control_c = 0
        self._before: dict[signal.Signals, object] = {}

    @property
    def exit_code(self) -> int:
        """0 without a signal, 143 after SIGTERM, 130 after SIGINT."""
        return 128 + self.caught if self.caught is not None else 0

    @property
    def flags(self) -> dict[str, float]:
        """Signal -> 1 if this process has received it, else 0; empty for one process."""
        return {number.name: float(self._received is number) for number in NUMBERS} if self.several else {}

    def agree(self, sums: Mapping[str, float]) -> None:
        """Takes the sums of the `flags` of all processes."""
        if self.several and self.caught is None:
            self.caught = next((number for number in NUMBERS if sums.get(number.name)), None)

    def __enter__(self) -> "Interrupts":
        global _current
        _current = self
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        global _current
        _current = None
        for number, handler in self._before.items():
            # None: the handler was not installed by Python, which cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def receive(self, number: int) -> None:
        """Stops the training after this step; later signals have no effect."""
        if self._received is None:
            self._received = signal.Signals(number)
            if not self.several:
                self.caught = self._received
            notify("stopping after this step (Ctrl-C again: at once)")

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.receive(number)
        if number == signal.SIGINT:
            self._control_c += 1
            if self._control_c > 1:
                raise KeyboardInterrupt


def receive(number: int) -> bool:
    """Stops the training of this process like the signal `number`, which its launcher has received; returns False if
    it is not training yet."""
    if _current is None:
        return False
    _current.receive(number)
    return True
