"""Tests, tunes and benchmarks the kernels on a machine with a GPU, torch, Triton and this checkout.

    PYTHONPATH=kernels python3 scripts/gpu/kernels_on_gpu.py --out $OUT --commit abc1234

Within --seconds, in this order: the test suite's cases on the device; correctness and time of every configuration;
attention, loss and sampling with the fastest configurations, compared with PyTorch; tables and a plot. Each step is a
separate process with a fraction of the time, so that a step that hangs or crashes does not stop the others. `--toy` is
a dry run on any machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "attention/attention_cases.py": ("check_operators", "check_edges", "dense", "low", "packed", "stored", "untied"),
    "cross_entropy/cross_entropy_cases.py": (),
    "sampling/sampling_cases.py": ("check_operators", "vocabularies", "distributions", "candidates"),
}
FRACTIONS = {"tune": 0.3, "attention": 0.45, "vocabulary": 0.1}
"""Fractions of the time that remains after the cases."""


def run(command: list[str | Path], seconds: float, log: Path) -> str:
    """Runs a step; returns "" if it succeeded, else how it ended. Its output goes to `log`."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        try:
            done = subprocess.run(command, stdout=file, stderr=file, timeout=max(1.0, seconds), env=environment)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    return "" if done.returncode == 0 else f"exit code {done.returncode}, see {log.name}"


def check(out: Path, end: float) -> list[dict]:
    """Runs the test suite's cases on this device; returns a row for each group."""
    rows = []
    for name, groups in CASES.items():
        for group in groups or ("",):
            output = out / "cases.txt"
            output.unlink(missing_ok=True)
            command = [sys.executable, ROOT / "tests" / "kernels" / name, *([group] if group else [])]
            failed = run(command, min(120.0, end - time.monotonic()), output)
            lines = output.read_text(encoding="utf-8").splitlines()
            found = [json.loads(line) for line in lines if line.startswith("{")]
            over = [row["case"] for row in found if wrong(row)]
            rows.append(
                {"cases": f"{name} {group}".strip(), "count": len(found), "over the bound": over, "failed": failed}
            )
            if failed:
                (out / "failed.txt").open("a", encoding="utf-8").write(output.read_text(encoding="utf-8"))
            print(json.dumps(rows[-1], allow_nan=False), flush=True)
            (out / "cases.json").write_text(json.dumps(rows, indent=1, allow_nan=False), encoding="utf-8")
    return rows


def wrong(row: dict) -> bool:
    """True for errors above twice those of plain PyTorch plus 1e-5, or words that differ from the reference's in more
    than a few rows."""
    if "errors" not in row:
        return not (row["other"] <= 0.1 and row["error"] <= 1e-5)  # NaN is wrong too
    errors = row["errors"].values() if isinstance(row["errors"], dict) else row["errors"]
    return not all(ours <= 2 * plain + 1e-5 for ours, plain in errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all steps together (default: 520)")
    parser.add_argument("--commit", default="", help="commit of the code, where there is no git")
    parser.add_argument("--toy", action="store_true", help="tiny shapes and no cases, on any machine")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    rows = [] if args.toy else check(args.out, time.monotonic() + 0.45 * args.seconds)
    bad = [row for row in rows if row["failed"] or row["over the bound"]]
    left = end - time.monotonic() - 10
    for step, fraction in FRACTIONS.items():
        command = [sys.executable, "-m", "fastbert_kernels.benchmarks", step, "--out", args.out]
        command += ["--seconds", f"{fraction * left:.0f}", *(["--commit", args.commit] if args.commit else [])]
        command += ["--toy", "--rounds", "2"] if args.toy else []
        tuned = args.out / "attention-tune.json"
        if step == "attention" and tuned.is_file() and "best" in tuned.read_text(encoding="utf-8"):
            command += ["--tiles", tuned]
        failed = run(command, min(fraction * left + 40, end - time.monotonic()), args.out / f"{step}.txt")
        if failed:
            bad.append({"step": step, "failed": failed})
        ended = {"step": step, "failed": failed, "seconds left": round(end - time.monotonic())}
        print(json.dumps(ended, allow_nan=False), flush=True)
    print(f"\n{len(bad)} failures" + "".join(f"\n{json.dumps(row, allow_nan=False)}" for row in bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
