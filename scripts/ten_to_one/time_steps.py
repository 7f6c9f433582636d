"""Times the steps of pretrainings, which alternate, each in a process of its own. Run it without other load.

    python scripts/ten_to_one/time_steps.py RUN... --data data/wiki --threads 2 --rounds 5 --out speed.json

A RUN is a folder of `fastbert pretrain` or of pretrain_with_trainer.py, whose config.yaml has the recipe. --out
receives, for each and for each length of its sequences, the milliseconds of a step in each round: the median over
--steps steps, without the first ones.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from measure_checkpoints import is_trainers, options_of, read_rows

from fastbert.config import to_yaml
from fastbert.data.stages import Stage, StageOptions, make_plan
from fastbert.errors import UserError
from fastbert.pretraining.options import PretrainOptions
from fastbert.records import write_json
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine

TRAINER = Path(__file__).parents[1] / "against_transformers" / "pretrain_with_trainer.py"
EVERY, FIRST = 5, 2  # steps of a measurement, and number of measurements at the beginning that are left out


def stages_of(options: PretrainOptions) -> list[Stage]:
    """The stages of a run."""
    return list(make_plan(options.stages, options.batch_size, options.length, options.steps).stages)


def with_one_stage(options: PretrainOptions, stage: Stage, arguments: argparse.Namespace) -> PretrainOptions:
    """The options of a short training with the sequences of a stage."""
    micro = options.machine.micro_batch_size
    return replace(
        options,
        data=arguments.data,
        out=None,
        length=stage.length,
        batch_size=stage.batch_size,
        stages=StageOptions(),
        steps=arguments.steps,
        milestones=None,
        log_every=EVERY,
        eval_every=arguments.steps,
        eval_sequences=8,
        checkpoint_every=arguments.steps,
        machine=replace(
            options.machine,
            threads=arguments.threads,
            micro_batch_size=micro and micro * options.length // stage.length,
        ),
    )


def milliseconds(run: Path, stage: Stage, arguments: argparse.Namespace) -> float:
    """Median time of a step."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, out = Path(folder) / "recipe.yaml", Path(folder) / "run"
        recipe.write_text(to_yaml(with_one_stage(options_of(run), stage, arguments)), encoding="utf-8")
        command = [sys.executable, str(TRAINER)] if is_trainers(run) else [sys.executable, "-m", "fastbert", "pretrain"]
        command += [str(recipe), "--out", str(out)]
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
    try:
        stages = {str(run): stages_of(options_of(run)) for run in arguments.runs}
        found = {run: {str(stage.length): [] for stage in parts} for run, parts in stages.items()}
        for _ in range(arguments.rounds):
            for run, stage in ((run, stage) for run, parts in stages.items() for stage in parts):
                times = found[run][str(stage.length)]
                times.append(round(milliseconds(Path(run), stage, arguments), 3))
                echo(f"{run}, length {stage.length}: {times[-1]} ms per step")
            facts = {"machine": describe_machine(), "threads": arguments.threads, "load": os.getloadavg()[0]}
            write_json(arguments.out, {**facts, "milliseconds": found})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
