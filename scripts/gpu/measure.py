"""Measures fastbert on a machine with one GPU, within a time limit and without an installation.

    PYTHONPATH=.:kernels python3 scripts/gpu/measure.py --plan a --out out --cache cache.tar.xz --commit abc1234
    PYTHONPATH=.:kernels python3 scripts/gpu/measure.py --plan b --out out --cache cache.tar.xz --data data/wiki

Plan a: results compared with float64, training that repeats to the bit, BERT-Base compared with transformers' BERT.
Plan b: attention with a learned bias compared with its peers, and a short pretraining. Each step is a process with its
own time limit: if it crashes or hangs, that is reported and the others continue. All results so far are in plan-a.json
and plan-a.md (plan-b), and what the steps printed is in plan-a.log. `--toy` is a dry run on any machine.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton_cache

from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.model.positions import POSITIONS
from fastbert.records import parse_json, write_json

ROOT = Path(__file__).resolve().parents[2]
STEPS = Path(__file__).with_name("steps.py")
LIMITS = {"a": 420.0, "b": 300.0}
"""Seconds of a plan."""
LAST = 15.0
"""Seconds of a plan for the start and the end of this process."""
EVERY = 5.0
"""Seconds between two writings of the results while no step ends."""
DEADLINE = "{deadline}"
"""Argument of a step that is replaced by the time at which it will be stopped, in seconds since 1970."""
LOG_BYTES = 1_000_000
"""Bytes of a step's output in the log: its end."""
PREPARING = 100.0
"""Seconds after which a step that is not prepared yet no longer delays the others that wait for the GPU."""
ROW, PREPARED = "ROW ", "prepared"
"""Beginning of a line of a step's output that has a row of the results as JSON; part of the row before it waits."""
CASES = {
    "attention": ("check_operators", "check_edges", "dense", "low", "packed", "stored", "untied"),
    "cross_entropy": ("main",),
    "sampling": ("check_operators vocabularies distributions candidates",),
}
"""Files of the test suite's cases, and their groups; those of one text run in one process."""
TOY = ("machine", "attention packed", "training tupe-r 0.1", "throughput", "attention 512", "pretrain")
"""Steps of a dry run, which have no limits of their own: any machine may be slow."""


@dataclass(frozen=True)
class Step:
    """A process, and its time limit in seconds from the start of its group."""

    name: str
    seconds: float
    arguments: tuple[str, ...]
    """Arguments of steps.py."""
    waits: bool = False
    """Prepares itself at once, and measures when no other step of the group runs."""
    rest: bool = False
    """Has, in addition to its limit, the time that the steps before it left."""


Group = list[Step]
"""Steps that run at the same time."""


def plan_a() -> list[Group]:
    checks = [
        Step(f"{name} {group}", 150, ("cases", name, *group.split()))
        for name, groups in CASES.items()
        for group in groups
    ]
    checks += [Step(f"encoders {position}", 150, ("encoders", position)) for position in POSITIONS]
    checks += [
        Step(f"training {position} {dropout}", 150, ("training", position, dropout))
        for position in ("absolute", "tupe-r")
        for dropout in ("0.0", "0.1")
    ]
    checks += [Step("bits", 150, ("bits",)), Step("throughput", 330, ("throughput",), waits=True)]
    return [[Step("machine", 70, ("machine",))], checks]


def plan_b(data: str, seconds: float = LIMITS["b"]) -> list[Group]:
    limits = {"512": 125.0, "128": 145.0, "2048": 165.0}
    peers = [Step(f"attention {length}", limit, ("peers", length), waits=True) for length, limit in limits.items()]
    pretrain = seconds - LAST - max(limits.values())
    return [peers, [Step("pretrain", pretrain, ("pretrain", data, DEADLINE), rest=True)]]


def seconds_of(groups: list[Group]) -> float:
    """Longest time that these groups can take."""
    return sum(max(step.seconds for step in group) for group in groups)


@dataclass
class Running:
    """A step that was started, and its results."""

    step: Step
    seconds: float = 0.0
    """Time limit."""
    process: subprocess.Popen | None = None
    output: Path | None = None
    """File of its standard output; that of standard error has the ending .err."""
    started: float = 0.0
    ended: str = ""
    """Reason of its end; empty until then."""
    took: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    has_gpu: bool = False

    @property
    def prepared(self) -> bool:
        """True if it waits for the GPU, or has waited for it."""
        return any(row.get("part") == PREPARED for row in self.rows)

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows that it printed since the last call."""
        with open(self.output, "rb") as file:
            file.seek(self.read)
            lines = file.read().split(b"\n")
        self.read += sum(len(line) + 1 for line in lines[:-1])  # the last line is not whole yet
        found = []
        for line in lines[:-1]:
            if line.startswith(ROW.encode()):
                try:
                    found.append(parse_json(line.decode(errors="replace").removeprefix(ROW), "the row", dict))
                except UserError as error:  # a child printed into the line
                    found.append({"result": f"error: {error}"})
        self.rows += found
        return found

    def log(self) -> bytes:
        """The end of what it printed, without rows."""
        if self.output is None:
            return b""
        printed = self.output.read_bytes().splitlines(keepends=True)
        others = b"".join(line for line in printed if not line.startswith(ROW.encode()))
        return others[-LOG_BYTES:] + self.output.with_suffix(".err").read_bytes()[-LOG_BYTES:]


class Measurement:
    """The steps of a plan and the files of their results."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.steps = args, folder, []
        self.started = time.monotonic()
        self.end = self.started + args.seconds - LAST / 2
        self.header = {
            "plan": args.plan,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": shlex.join(sys.argv),
            "commit": args.commit,
            "toy": args.toy,
            "kernels in --cache": args.kernels,
        }
        self.environment = {**os.environ, **triton_cache.environment(folder / "triton"), "OMP_NUM_THREADS": "1"}
        self.environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"
        self.environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        if args.toy:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""

    def run(self, groups: list[Group]) -> None:
        for group in groups:
            running = [self.start(step) for step in group]
            self.write()
            written = time.monotonic()
            while any(not one.ended for one in running):
                if any([self.look_at(one) for one in running]) or time.monotonic() > written + EVERY:
                    self.write()
                    written = time.monotonic()
                self.give_gpu(running)
                time.sleep(0.1)

    def start(self, step: Step) -> Running:
        """Start a step, or report that there is no time left."""
        self.steps.append(one := Running(step, started=time.monotonic()))
        left = self.end - one.started
        one.seconds = left if step.rest else min(step.seconds, left)
        if one.seconds < 1:
            one.ended = "not measured: time was up"
            return one
        one.output = self.folder / f"{len(self.steps)}.txt"
        arguments = [f"{time.time() + one.seconds:.0f}" if text == DEADLINE else text for text in step.arguments]
        command = [sys.executable, STEPS, *(["--toy"] if self.args.toy else [])]
        with open(one.output, "wb") as file, open(one.output.with_suffix(".err"), "wb") as errors:
            # A group of its own, so that the limit ends its children too.
            one.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=errors,
                env=self.environment | ({"TRITON_INTERPRET": "1"} if self.args.toy and "cases" in arguments else {}),
                process_group=0,
            )
        return one

    def look_at(self, one: Running) -> bool:
        """Report new rows of a step; True if it has ended."""
        if one.ended:
            return False
        code = one.process.poll()
        one.took = time.monotonic() - one.started
        if code is None and one.took > one.seconds:
            code = "limit"
        if code is not None:
            self.stop(one)
            one.ended = "finished" if code == 0 else f"stopped after its limit of {one.seconds:.0f} s"
            if code not in (0, "limit"):
                one.ended = f"error: exit code {code}, see the log"
        for row in one.read_rows():
            print(f"{time.monotonic() - self.started:4.0f} s  {one.step.name}: {line_of(row)}", flush=True)
        if one.ended and one.ended != "finished":
            print(f"{time.monotonic() - self.started:4.0f} s  {one.step.name}: {one.ended}", flush=True)
        return bool(one.ended)

    def stop(self, one: Running) -> None:
        with suppress(ProcessLookupError):  # if all its processes have ended
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        one.process.stdin.close()

    def stop_all(self) -> None:
        for one in self.steps:
            if one.process is not None and not one.ended:
                self.stop(one)
                one.ended = "error: this measurement was interrupted"

    def give_gpu(self, running: list[Running]) -> None:
        """Let the next waiting step measure, if no other is running."""
        active = [one for one in running if not one.ended]
        waiting = [one for one in active if one.prepared and not one.has_gpu]
        late = time.monotonic() > self.started + PREPARING  # what hangs must not stop the others
        if not waiting or any(not (one.prepared or (one.step.waits and late)) or one.has_gpu for one in active):
            return
        waiting[0].has_gpu = True
        with suppress(BrokenPipeError):  # if it has ended, which the next look reports
            waiting[0].process.stdin.write(b"go\n")
            waiting[0].process.stdin.flush()

    def write(self) -> None:
        """Write the three files, each whole."""
        name = self.args.out / f"plan-{self.args.plan}"
        found = {
            one.step.name: {
                "limit": round(one.seconds),
                "seconds": round(one.took, 1),
                "ended": one.ended or "running",
                "rows": one.rows,
            }
            for one in self.steps
        }
        write_json(f"{name}.json", {**self.header, "seconds": round(time.monotonic() - self.started), "steps": found})
        with atomic_file(f"{name}.md", "w") as file:
            header = [f"- {key}: {value}" for key, value in self.header.items()]
            file.write("\n".join([f"# Plan {self.args.plan}", "", *header, "", *self.tables(), ""]))
        with atomic_file(f"{name}.log", "wb") as file:
            for one in self.steps:
                file.write(f"\n=== {one.step.name}: {one.ended or 'running'}\n".encode())
                file.write(one.log())

    def tables(self, all_rows: bool = True) -> list[str]:
        """Markdown: a section for each step, without the checks that hold unless `all_rows`."""
        lines = []
        for one in self.steps:
            rows = [row for row in one.rows if all_rows or row.get("result") != "holds"]
            held = sum(row.get("result") == "holds" for row in one.rows)
            lines += [f"## {one.step.name}", "", f"{one.ended or 'running'}, {one.took:.0f} s; {held} checks hold", ""]
            lines += [table(rows), ""] if rows else []
        return lines

    @property
    def failed(self) -> bool:
        results = [one.ended for one in self.steps] + [row.get("result", "") for one in self.steps for row in one.rows]
        return any(result.startswith(("fails", "error", "stopped")) for result in results)


def line_of(row: dict[str, Any]) -> str:
    return ", ".join(f"{k} {text_of(v)}" for k, v in row.items() if not isinstance(v, list | dict) and v is not None)


def text_of(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "/")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown tables, one for rows of the same names; lists and mappings are in the JSON only."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        names = tuple(name for name, value in row.items() if not isinstance(value, list | dict))
        groups.setdefault(names, []).append(row)
    return "\n\n".join(
        "\n".join(
            f"| {' | '.join(line)} |"
            for line in [names, ["---"] * len(names), *([text_of(row[name]) for name in names] for row in found)]
        )
        for names, found in groups.items()
    )


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=LIMITS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--seconds", type=float, help="time limit (default: 420 for plan a, 300 for plan b)")
    parser.add_argument("--cache", type=Path, help="kernels compiled before, a file of compile_cache.py")
    parser.add_argument("--commit", default="", help="commit of the code, where there is no git")
    parser.add_argument("--data", default="", help="plan b: a prepared folder to pretrain on")
    parser.add_argument("--toy", action="store_true", help="dry run of a few steps with tiny sizes, on any machine")
    return parser


def main() -> int:
    args = (parser := command_line()).parse_args()
    if args.data and not Path(args.data).is_dir():
        parser.error(f"there is no folder {args.data}; --data is one that `fastbert prepare` wrote")
    args.seconds = args.seconds or LIMITS[args.plan]
    groups = plan_a() if args.plan == "a" else plan_b(args.data, args.seconds)
    if args.toy:
        groups = [[replace(step, seconds=args.seconds) for step in group if step.name in TOY] for group in groups]
    with tempfile.TemporaryDirectory(prefix="fastbert-measure-", ignore_cleanup_errors=True) as folder:
        try:
            args.kernels = triton_cache.unpack(args.cache, Path(folder) / "triton") if args.cache else None
            measurement = Measurement(args, Path(folder))
            measurement.write()
        except UserError as error:
            parser.error(str(error))
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            measurement.run(groups)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        finally:
            measurement.stop_all()
            measurement.write()
    print("\n".join(["", *measurement.tables(all_rows=False)]))
    return int(measurement.failed)


if __name__ == "__main__":
    sys.exit(main())
