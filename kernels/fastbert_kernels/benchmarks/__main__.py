"""python -m fastbert_kernels.benchmarks WHAT --out FOLDER"""

import argparse
import json
import sys
from pathlib import Path

import torch

from fastbert_kernels.benchmarks.measuring import Settings


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastbert_kernels.benchmarks", description=__doc__)
    what = ("compiled", "tune", "attention", "vocabulary", "report")
    parser.add_argument("what", choices=what, help="compiled and report need no GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.json, NAME.md and pictures")
    parser.add_argument(
        "--tiles", type=Path, help="attention-tune.json, whose fastest configurations `attention` takes"
    )
    parser.add_argument("--keep", action="store_true", help="tune: keep the fastest for trainings on this GPU")
    parser.add_argument("--seconds", type=float, default=480.0, help="no new row after this (default: 480)")
    parser.add_argument("--rounds", type=int, default=20, help="that are timed (default: 20)")
    parser.add_argument("--commit", help="of the code, for the report")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, on any machine, to rehearse")
    args = parser.parse_args(arguments)
    if args.what not in ("compiled", "report") and not args.toy and not torch.cuda.is_available():
        parser.error("there is no GPU here; --toy rehearses without one")
    settings = Settings(args.out, args.seconds, args.rounds, args.toy)
    if args.what == "compiled":
        from fastbert_kernels.benchmarks.compiled import compiled

        compiled(settings)
    elif args.what == "tune":
        from fastbert_kernels.benchmarks.attention import tune

        tune(settings, args.keep)
    elif args.what == "attention":
        from fastbert_kernels.benchmarks.attention import bench

        rows = json.loads(args.tiles.read_text(encoding="utf-8"))["rows"] if args.tiles else []
        bench(settings, next((row["best"] for row in rows if "best" in row), None))
    elif args.what == "vocabulary":
        from fastbert_kernels.benchmarks.vocabulary import vocabulary

        vocabulary(settings)
    from fastbert_kernels.benchmarks.report import report

    print(*report(args.out, args.commit), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
