"""Command line: python -m fastbert_kernels.benchmarks BENCHMARK --out FOLDER"""

import argparse
import json
import sys
from pathlib import Path

import torch

from fastbert_kernels.benchmarks.measuring import Settings


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastbert_kernels.benchmarks", description=__doc__)
    names = ("compiled", "tune", "attention", "vocabulary", "report")
    parser.add_argument("benchmark", choices=names, help="compiled and report need no GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.json, NAME.md and pictures")
    parser.add_argument("--tiles", type=Path, help="attention-tune.json with the configurations for `attention`")
    parser.add_argument(
        "--save", action="store_true", help="tune: save the fastest configurations for runs on this GPU"
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="time limit for starting a new row (default: 480)")
    parser.add_argument("--rounds", type=int, default=20, help="number of timed rounds (default: 20)")
    parser.add_argument("--commit", help="commit of the code, for the report")
    parser.add_argument("--toy", action="store_true", help="dry run: tiny shapes, on any machine")
    args = parser.parse_args(arguments)
    if args.benchmark not in ("compiled", "report") and not args.toy and not torch.cuda.is_available():
        parser.error("there is no GPU; use --toy for a dry run without one")
    settings = Settings(args.out, args.seconds, args.rounds, args.toy)
    if args.benchmark == "compiled":
        from fastbert_kernels.benchmarks.compiled import compiled

        compiled(settings)
    elif args.benchmark == "tune":
        from fastbert_kernels.benchmarks.attention import tune

        tune(settings, args.save)
    elif args.benchmark == "attention":
        from fastbert_kernels.benchmarks.attention import bench

        rows = json.loads(args.tiles.read_text(encoding="utf-8"))["rows"] if args.tiles else []
        bench(settings, next((row["best"] for row in rows if "best" in row), None))
    elif args.benchmark == "vocabulary":
        from fastbert_kernels.benchmarks.vocabulary import vocabulary

        vocabulary(settings)
    from fastbert_kernels.benchmarks.report import report

    print(*report(args.out, args.commit), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
