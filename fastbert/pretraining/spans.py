"""Parts of a step from a profiler's spans: assigns each span to a part, and adds up the time of each part."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

OUTER = {
    "data": "data: rows and masks",
    "forward": "forward: head and loss",
    "backward": "backward: the rest",
    "clipping": "gradient clipping",
    "optimizer": "optimizer",
    "after the step": "after the step: notes, gradients freed",
    "logging": "logging",
}
"""Marks of the loop -> name of the part that consists of their time outside inner marks."""
COMPILED, REGION = "compiled blocks", "Torch-Compiled Region"
INNER = ("embedding", "attention", "feed-forward", "norms, dropout, sums", COMPILED, "second network")
"""Marks within the forward pass; torch marks compiled code by REGION and a number."""
LOOP, IDLE = "between the parts", "the GPU waits for the host"
_NODE = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Span:
    """A time span of the host, such as an operator; times in microseconds."""

    name: str
    thread: int
    start: float
    end: float
    sequence: int = -1
    """Autograd's sequence number: of the next node for a forward operator, of itself for a node of the backward
    pass."""
    kernels: float = 0.0
    """Time on the device of the kernels that this span launched."""
    is_async: bool = False


@dataclass
class _Assigned:
    span: Span
    part: str | None
    own: float
    """Time without that of the spans inside."""


def parts(spans: list[Span], steps: int, device: bool) -> list[dict[str, Any]]:
    """The parts of a step in the order of `OUTER`: `part`, `ms` per step, and `fraction` of the total.

    Args:
        spans: with one named "step" around each step.
        steps: number of steps.
        device: whether the device's time is measured instead of the host's; its idle time is then a part.
    """
    took: Counter[str] = Counter()
    for assigned in assign_parts(spans):
        if assigned.part is not None:
            took[assigned.part] += assigned.span.kernels if device else assigned.own
    total = sum(span.end - span.start for span in spans if span.name == "step")
    if device:
        took[IDLE] = max(0.0, total - sum(took.values()))
    total = max(total, sum(took.values()))
    forward, backward = ([f"{way}: {name}" for name in INNER] for way in ("forward", "backward"))
    names = list(OUTER.values())
    order = [names[0], *forward, names[1], *backward, "backward: head and loss", *names[2:], LOOP, IDLE]
    return [
        {"part": name, "ms": round(took[name] / 1000 / steps, 3), "fraction": round(took[name] / total, 4)}
        for name in order
        if took[name] > 0
    ]


def operators(spans: list[Span], steps: int, device: bool) -> list[dict[str, Any]]:
    """The operators of a step, largest first: `operator`, `calls` per step, `ms` per step without the operators that it
    calls, and `fraction` of the total."""
    took, calls = Counter[str](), Counter[str]()
    for assigned in assign_parts(spans):
        if assigned.part is None or assigned.span.name in {*OUTER, *INNER, "step"}:
            continue
        took[assigned.span.name] += assigned.span.kernels if device else assigned.own
        calls[assigned.span.name] += 1
    total = sum(span.end - span.start for span in spans if span.name == "step")
    return [
        {
            "operator": name.removeprefix(f"{_NODE}: "),
            "calls": round(calls[name] / steps, 1),
            "ms": round(value / 1000 / steps, 3),
            "fraction": round(value / total, 4),
        }
        for name, value in took.most_common()
        if value > 0
    ]


def assign_parts(spans: list[Span]) -> list[_Assigned]:
    """Each span with its part of the step (None: outside of a step), by the innermost mark around it."""
    assigned: list[_Assigned] = []
    nested: dict[int, list[_Assigned]] = {}
    makers: dict[int, str] = {}  # number of a node -> the part whose operator created it
    for span in sorted((s for s in spans if not s.is_async), key=lambda s: (s.start, -s.end)):
        stack = nested.setdefault(span.thread, [])
        while stack and stack[-1].span.end <= span.start:
            stack.pop()
        around = stack[-1] if stack else None
        here = _Assigned(span, _part(span, around.part if around else None, makers), span.end - span.start)
        if around is not None:
            around.own -= span.end - span.start
        if here.part is not None and not here.part.startswith("backward") and span.sequence >= 0:
            makers[span.sequence] = here.part  # the last operator with the number creates the node
        stack.append(here)
        assigned.append(here)
    return assigned


def _part(span: Span, around: str | None, makers: dict[int, str]) -> str | None:
    if span.name == "step":
        return LOOP
    if around is not None and span.name in OUTER:
        return OUTER[span.name]
    if around == f"forward: {INNER[0]}" and span.name.startswith(REGION):
        return f"forward: {COMPILED}"
    if around is not None and span.name in INNER and around.startswith("forward"):
        return f"forward: {span.name}"
    if span.name.startswith(_NODE):
        maker = makers.get(span.sequence, "")
        if maker == LOOP:  # the sum of the losses
            maker = OUTER["forward"]
        if maker.startswith("forward"):
            return maker.replace("forward", "backward", 1)
        return OUTER["backward"] if around or makers else None
    return around
