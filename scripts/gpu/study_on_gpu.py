"""Runs an ablation on a GPU in parts: it is stopped after --seconds and continues in the next call.

    PYTHONPATH=.:kernels python3 scripts/gpu/study_on_gpu.py configs/ablate/study-gpu.yaml --glue-dir glue --out $OUT

It needs the prepared folder of the YAML file, and the files of its tasks. Jobs stay in runs/ between calls on one
machine. On a new machine give the OUT of the last part as --previous: finished jobs are not run again, except trainings
that remaining jobs start from. OUT receives results.jsonl, ablation.json and the report of all finished jobs. `--toy`
is a dry run with tiny encoders on any machine.
"""

import argparse
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import torch
import yaml

from fastbert.errors import UserError
from fastbert.streams import echo
from fastbert.studies.ablate import costs
from fastbert.studies.ablate.ablate import ABLATION, ablate
from fastbert.studies.ablate.options import AblateOptions, load_ablation
from fastbert.studies.engine.store import RESULTS

LONGEST = 500  # seconds of a part
STOPPED = 128 + signal.SIGTERM
COPIED = (RESULTS, f"{ABLATION}.json")
REPORT = ("report/report.md", "report/report.html")
TINY = {"layers": 1, "width": 16, "heads": 2, "length": 16, "first_length": 8, "batch_size": 4, "eval_sequences": 4}
TOY = {
    "base": {**TINY, "schedule": {"warmup": 1}},
    "budget": {"tokens": 20 * TINY["batch_size"] * TINY["length"]},
    **{"seeds": 1, "threads": 1, "epochs": 1, "finetune": {"glue_subset": True}},
    "anneal": {"points": [0.5, 1.0], "fraction": 0.2},
    "tasks": ["cola", "configs/tasks/snli.yaml"],
    "tasks_at": [1.0],
}
"""Changes of the YAML file for a dry run in seconds: every variant with one seed and two points, of which the last is
fine-tuned on two tasks."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="an ablation's YAML file")
    parser.add_argument("--glue-dir", required=True, help="the official GLUE archive")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and report")
    parser.add_argument("--previous", type=Path, help="the --out of a part on another machine")
    parser.add_argument("--workers", type=int, default=4, help="number of concurrent jobs")
    parser.add_argument(
        "--seconds", type=lambda x: min(float(x), LONGEST), default=LONGEST, help="time limit of this part"
    )
    parser.add_argument("--toy", action="store_true", help="tiny encoders, on a CPU too")
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        parser.error("there is no GPU; --toy is a dry run on the CPU")
    config, folder = args.config, Path("runs") / args.config.stem
    args.out.mkdir(parents=True, exist_ok=True)
    if args.toy:
        costs.ROUND_STEPS = 2
        config = args.out / args.config.name
        config.write_text(yaml.safe_dump({"inherits": str(args.config.resolve()), **TOY}), encoding="utf-8")
    if args.previous and not (folder / RESULTS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            shutil.copy(args.previous / name, folder)
    clock = threading.Timer(args.seconds, os.kill, (os.getpid(), signal.SIGTERM))
    clock.daemon = True
    clock.start()
    try:
        options = AblateOptions(out=str(folder), workers=args.workers, glue_dir=args.glue_dir)
        code = ablate(load_ablation(config)[0], options)
    except UserError as error:
        parser.error(str(error))
    finally:
        clock.cancel()
        for name in (*COPIED, *REPORT):
            if (folder / name).exists():
                shutil.copy(folder / name, args.out)
    if code == STOPPED:
        echo("the time of this part is over; the same command continues")
    return 0 if code == STOPPED else code


if __name__ == "__main__":
    sys.exit(main())
