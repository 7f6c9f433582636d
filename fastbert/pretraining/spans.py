"""From a profiler's spans to parts of a step: which part each moment belongs to, and how much each part took."""

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
"""Marks of the loop, and what the part is called that has no mark within."""
COMPILED, REGION = "compiled blocks", "Torch-Compiled Region"
INNER = ("embedding", "attention", "feed-forward", "norms, dropout, sums", COMPILED, "second network")
"""Marks within the forward pass; what torch.compile made marks itself, as REGION and a number."""
LOOP, IDLE = "between the parts", "the GPU waits for the host"
_NODE = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Span:
    """Something that ran on the host; times in microseconds."""

    name: str
    thread: int
    start: float
    end: float
    sequence: int = -1
    """Autograd's number: of the next node made, for a forward operator; its own, for a node of the backward pass."""
    kernels: float = 0.0
    """What the device took for what this span itself started."""
    is_async: bool = False


@dataclass
class _Placed:
    span: Span
    part: str | None
    own: float
    """Without the spans within."""


def parts(spans: list[Span], steps: int, device: bool) -> list[dict[str, Any]]:
    """The parts of a step in the order of `OUTER`: `part`, `ms` of one step, and `share` of all.

    Args:
        spans: with one named "step" around each step.
        steps: how many.
        device: whether the device's time counts and not the host's. The device may be idle: that is a part then.
    """
    took: Counter[str] = Counter()
    for placed in place(spans):
        if placed.part is not None:
            took[placed.part] += placed.span.kernels if device else placed.own
    total = sum(span.end - span.start for span in spans if span.name == "step")
    if device:
        took[IDLE] = max(0.0, total - sum(took.values()))
    total = max(total, sum(took.values()))
    forward, backward = ([f"{way}: {name}" for name in INNER] for way in ("forward", "backward"))
    names = list(OUTER.values())
    order = [names[0], *forward, names[1], *backward, "backward: head and loss", *names[2:], LOOP, IDLE]
    return [
        {"part": name, "ms": round(took[name] / 1000 / steps, 3), "share": round(took[name] / total, 4)}
        for name in order
        if took[name] > 0
    ]


def operators(spans: list[Span], steps: int, device: bool) -> list[dict[str, Any]]:
    """The operators of a step, largest first: `operator`, `calls` and `ms` of one step without what it calls itself,
    `share` of all."""
    took, calls = Counter[str](), Counter[str]()
    for placed in place(spans):
        if placed.part is None or placed.span.name in {*OUTER, *INNER, "step"}:
            continue
        took[placed.span.name] += placed.span.kernels if device else placed.own
        calls[placed.span.name] += 1
    total = sum(span.end - span.start for span in spans if span.name == "step")
    return [
        {
            "operator": name.removeprefix(f"{_NODE}: "),
            "calls": round(calls[name] / steps, 1),
            "ms": round(value / 1000 / steps, 3),
            "share": round(value / total, 4),
        }
        for name, value in took.most_common()
        if value > 0
    ]


def place(spans: list[Span]) -> list[_Placed]:
    """Each span with the part of the step it belongs to (None: outside), by the innermost mark around it."""
    placed: list[_Placed] = []
    nested: dict[int, list[_Placed]] = {}
    makers: dict[int, str] = {}  # number of a node -> the part whose operator made it
    for span in sorted((s for s in spans if not s.is_async), key=lambda s: (s.start, -s.end)):
        stack = nested.setdefault(span.thread, [])
        while stack and stack[-1].span.end <= span.start:
            stack.pop()
        around = stack[-1] if stack else None
        here = _Placed(span, _part(span, around.part if around else None, makers), span.end - span.start)
        if around is not None:
            around.own -= span.end - span.start
        if here.part is not None and not here.part.startswith("backward") and span.sequence >= 0:
            makers[span.sequence] = here.part  # the last to bear the number is the one that makes the node
        stack.append(here)
        placed.append(here)
    return placed


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
