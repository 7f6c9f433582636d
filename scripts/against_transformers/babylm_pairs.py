"""Compares the scores of `fastbert evaluate --pairs` with those of the backend mlm of BabyLM's evaluation, which opens
the same export through AutoModelForMaskedLM, on the same pairs.

    git clone https://github.com/babylm-org/babylm-eval
    python scripts/against_transformers/babylm_pairs.py --babylm babylm-eval --model runs/x --pairs blimp --each 20

Its evaluation also needs the packages aiohttp, tqdm and pillow. --each is the number of pairs of each file.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot.pair_files import pair_files
from fastbert.pretraining.zero_shot.pairs import measure_pairs
from fastbert.records import json_text
from fastbert.training.options import MachineOptions


def shortened(pairs: str, folder: Path, each: int) -> None:
    """Copies the first `each` lines of every file."""
    for file in pair_files(pairs):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:each]
        (folder / file.name).write_text("".join(lines), encoding="utf-8")


def theirs(babylm: Path, export: Path, folder: Path) -> tuple[dict[tuple[str, str], tuple[float, float]], float, float]:
    """Scores of both sentences by pair, the mean accuracy in percent, and the seconds of the scoring."""
    sys.path.insert(0, str(babylm / "strict"))
    from evaluation_pipeline.sentence_zero_shot import compute_results, dataset, run

    args = SimpleNamespace(
        **{"backend": "mlm", "task": "blimp", "data_path": folder, "model_path_or_name": str(export)},
        **{"revision_name": None, "images_path": None, "image_template": None, "image_split": None},
        **{"full_sentence_scores": False, "batch_size": 64, "non_causal_batch_size": 64, "save_predictions": False},
    )
    scores: dict[tuple[str, str], tuple[float, float]] = {}
    rank = compute_results.rank_and_evaluate

    def recorded(args, stats, log_probs, sentences, *others):
        for one, good, bad in zip(sentences, *log_probs[1.0], strict=True):
            scores[tuple(one["sentences"])] = (good.item(), bad.item())
        rank(args, stats, log_probs, sentences, *others)

    compute_results.rank_and_evaluate = recorded
    model, loader = run.get_model(args), dataset.get_dataloader(args)
    began = time.perf_counter()
    results, _ = compute_results.compute_results(args, model, loader, [1.0])
    seconds = time.perf_counter() - began
    _, averages = run.process_results(args, results)
    return scores, averages[1.0], seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("babylm", "model", "pairs"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--each", type=int, default=20)
    given = parser.parse_args()
    model = Path(given.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pairs"
        folder.mkdir()
        shortened(given.pairs, folder, given.each)
        out = Path(temporary) / "scores.jsonl"
        machine = MachineOptions(precision="fp32")
        began = time.perf_counter()
        ours = measure_pairs(EvaluateOptions(model=str(model), pairs=str(folder), out=str(out), machine=machine))
        ours_seconds = time.perf_counter() - began
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        export = model / "model" if (model / "model").is_dir() else model
        scores, accuracy, seconds = theirs(Path(given.babylm), export, folder)
    differences = []
    for row in rows:
        other = scores[row["sentence_good"], row["sentence_bad"]]
        differences += [
            abs(row["scores"]["pll"][key] - value) for key, value in zip(("good", "bad"), other, strict=True)
        ]
    result = {
        "model": str(model),
        "pairs": len(rows),
        "largest_difference": max(differences),
        "median_difference": statistics.median(differences),
        "accuracy": 100 * ours["accuracy"],
        "accuracy_babylm": accuracy,
        "ties": ours["ties"],
        "seconds": ours_seconds,
        "seconds_babylm": seconds,
    }
    print(json_text(result))
    # A tie counts as correct there, half here.
    ties = 100 * np.mean([one["ties"] / one["count"] for one in ours["paradigms"].values()]) / 2
    equal = math.isclose(result["accuracy"] + ties, accuracy, abs_tol=1e-6)
    return 0 if max(differences) < 1e-4 and equal else 1


if __name__ == "__main__":
    torch.set_num_threads(2)
    sys.exit(main())
