"""The kernels on a machine with a GPU, torch, Triton and this checkout: right, then tuned, then beside their peers.

    PYTHONPATH=kernels python3 scripts/gpu/kernels_on_gpu.py --out $OUT --commit abc1234

Within --seconds, in this order: the test suite's cases on the device; every configuration, right or not, and its time;
attention, the loss and the draw beside what PyTorch has, with the fastest configurations; tables and a picture. Each
step is a process of its own with a share of the time, so that one that hangs or dies ends alone. `--toy` rehearses it
anywhere.
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
    "attention/attention_cases.py": ("check_operators", "check_edges", "dense", "low", "packed", "untied"),
    "cross_entropy/cross_entropy_cases.py": (),
    "sampling/sampling_cases.py": ("check_operators", "vocabularies", "distributions", "candidates"),
}
SHARES = {"tune": 0.3, "attention": 0.45, "vocabulary": 0.1}
"""Of the time that is left after the cases."""


def run(command: list[str | Path], seconds: float, log: Path) -> str:
    """Runs a step; "" if it ended well, else how it ended. What it said goes to `log`."""
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
    """The test suite's cases on this device: a row for each group."""
    rows = []
    for name, groups in CASES.items():
        for group in groups or ("",):
            said = out / "cases.txt"
            said.unlink(missing_ok=True)
            command = [sys.executable, ROOT / "tests" / "kernels" / name, *([group] if group else [])]
            failed = run(command, min(120.0, end - time.monotonic()), said)
            found = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
            over = [row["case"] for row in found if wrong(row)]
            rows.append(
                {"cases": f"{name} {group}".strip(), "count": len(found), "over the bound": over, "failed": failed}
            )
            if failed:
                (out / "failed.txt").open("a", encoding="utf-8").write(said.read_text(encoding="utf-8"))
            print(json.dumps(rows[-1], allow_nan=False), flush=True)
            (out / "cases.json").write_text(json.dumps(rows, indent=1, allow_nan=False), encoding="utf-8")
    return rows


def wrong(row: dict) -> bool:
    """Errors over twice plain PyTorch's and 1e-5; or other words than the reference's in more than a rare row."""
    if "errors" not in row:
        return not (row["other"] <= 0.1 and row["error"] <= 1e-5)  # NaN is wrong too
    errors = row["errors"].values() if isinstance(row["errors"], dict) else row["errors"]
    return not all(ours <= 2 * plain + 1e-5 for ours, plain in errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all steps together (default: 520)")
    parser.add_argument("--commit", default="", help="of the code, where there is no git")
    parser.add_argument("--toy", action="store_true", help="tiny shapes and no cases, on any machine")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    rows = [] if args.toy else check(args.out, time.monotonic() + 0.45 * args.seconds)
    bad = [row for row in rows if row["failed"] or row["over the bound"]]
    left = end - time.monotonic() - 10
    for step, share in SHARES.items():
        command = [sys.executable, "-m", "fastbert_kernels.benchmarks", step, "--out", args.out]
        command += ["--seconds", f"{share * left:.0f}", *(["--commit", args.commit] if args.commit else [])]
        command += ["--toy", "--rounds", "2"] if args.toy else []
        tuned = args.out / "attention-tune.json"
        if step == "attention" and tuned.is_file() and "best" in tuned.read_text(encoding="utf-8"):
            command += ["--tiles", tuned]
        failed = run(command, min(share * left + 40, end - time.monotonic()), args.out / f"{step}.txt")
        if failed:
            bad.append({"step": step, "failed": failed})
        ended = {"step": step, "failed": failed, "seconds left": round(end - time.monotonic())}
        print(json.dumps(ended, allow_nan=False), flush=True)
    print(f"\n{len(bad)} failures" + "".join(f"\n{json.dumps(row, allow_nan=False)}" for row in bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
