"""Fine-tunes a pretrained encoder on SNLI, SST-2 and STS-B, over three seeds each, with the same settings for all.

    python scripts/ten_to_one/fine_tune.py MODEL --glue-dir glue --snli configs/tasks/snli.yaml --out tuned

MODEL is anything that `fastbert finetune --model` takes. --out receives scores.json: for each task the scores (x 100)
of the seeds on dev after the last epoch, so that no epoch is selected on dev. The same command continues.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import fastbert
from fastbert.errors import UserError
from fastbert.records import write_json

TASKS = {"snli": ("accuracy", 3), "sst2": ("accuracy", 3), "stsb": ("spearman", 10)}  # metric and epochs


def scores(results: dict[str, Any], metric: str) -> list[float]:
    """Scores of the seeds after the last epoch, the mean of the dev splits, x 100."""
    found = []
    for seed in results["fractions"][-1]["seeds"]:
        splits = [figures[metric] for figures in seed["last"]["dev"].values()]
        found.append(100 * sum(splits) / len(splits))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="pretrained encoder")
    parser.add_argument("--glue-dir", required=True, help="folder of the GLUE archive")
    parser.add_argument("--snli", required=True, help="YAML file of the task SNLI")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="default: 3e-4")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of an input (default: 64)")
    parser.add_argument("--epochs", type=int, help="default: 3, for STS-B 10")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    found = {}
    try:
        for task in arguments.tasks:
            metric, epochs = TASKS[task]
            data = {"task": arguments.snli} if task == "snli" else {"task": task, "glue_dir": arguments.glue_dir}
            result = fastbert.finetune(
                model=arguments.model,
                **data,
                learning_rate=arguments.learning_rate,
                epochs=arguments.epochs or epochs,
                seeds=arguments.seeds,
                max_length=arguments.max_length,
                save_model=False,
                machine={"threads": arguments.threads},
                out=str(arguments.out / task),
            )
            if not result.finished:
                raise UserError("stopped; the same command continues")
            found[task] = scores(result.results[task], metric)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    write_json(arguments.out / "scores.json", found)


if __name__ == "__main__":
    main()
