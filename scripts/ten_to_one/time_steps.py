"""Times the steps of pretrainings, which alternate, each in a process of its own. Run it without other load.

    python scripts/ten_to_one/time_steps.py RUN... --data data/wiki --threads 2 --rounds 5 --out speed.json

A RUN is a folder of `fastbert pretrain` or of pretrain_with_trainer.py, whose config.yaml has the recipe. --out
receives, for each, the milliseconds of a step in each round: the median over --steps steps, without the first ones.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure_checkpoints import is_trainers, options_of, read_rows

from fastbert.errors import UserError
from fastbert.records import write_json
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine

TRAINER = Path(__file__).parents[1] / "against_transformers" / "pretrain_with_trainer.py"
EVERY, FIRST = 5, 2  # steps of a measurement, and number of measurements at the beginning that are left out


def milliseconds(run: Path, arguments: argparse.Namespace) -> float:
    """Median time of a step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(TRAINER)] if is_trainers(run) else [sys.executable, "-m", "fastbert", "pretrain"]
        command += [str(run / "config.yaml"), "--data", arguments.data, "--out", str(out)]
        steps = str(arguments.steps)
        command += ["--steps", steps, "--milestones", steps, "--log-every", str(EVERY)]
        command += ["--machine.threads", str(arguments.threads)]
        if not is_trainers(run):
            command += ["--eval-every", str(arguments.steps), "--eval-sequences", "8"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed:\n{done.stderr}")
        times = seconds_of_steps(out)
    return 1000 * statistics.median(times[FIRST:])


def seconds_of_steps(out: Path) -> list[float]:
    """Seconds of a step in each measurement of EVERY steps."""
    if is_trainers(out):
        return [row["seconds"] / EVERY for row in read_rows(out / "steps.jsonl")]
    options = options_of(out)
    tokens = options.batch_size * options.length
    return [tokens / row["tokens_per_second"] for row in read_rows(out / "metrics.jsonl") if row["split"] == "train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", required=True, help="prepared text")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--steps", type=int, default=60, help="steps of a training (default: 60)")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    arguments = parser.parse_args()
    found: dict[str, Any] = {str(run): [] for run in arguments.runs}
    try:
        for _ in range(arguments.rounds):
            for run in arguments.runs:
                found[str(run)].append(round(milliseconds(run, arguments), 3))
                echo(f"{run}: {found[str(run)][-1]} ms per step")
            facts = {"machine": describe_machine(), "threads": arguments.threads, "load": os.getloadavg()[0]}
            write_json(arguments.out, {**facts, "milliseconds": found})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
