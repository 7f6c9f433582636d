"""Measures the checkpoints of pretrainings by the same code: masked loss on held-out rows with fixed masks, and minimal
pairs.

    python scripts/ten_to_one/measure_checkpoints.py RUN... --data data/wiki --pairs blimp100 --out measured.jsonl

A RUN is a folder of `fastbert pretrain`, of which the milestones and the last checkpoint are measured, or one of
pretrain_with_trainer.py, of which all exports are; with --last only the last one. --out receives a line for each; lines
that it has are not measured again.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

from fastbert.config import load_yaml
from fastbert.data.batches import PackedRows, validation_batches
from fastbert.data.shards import open_dataset
from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.hub.load import load_pretrained, tokenizer_of
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.evaluation import evaluate
from fastbert.pretraining.held_out import trained_objective
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.run import stored_options
from fastbert.pretraining.zero_shot.pairs import measure_pairs
from fastbert.records import json_text, parse_json
from fastbert.streams import echo
from fastbert.training.checkpoints import checkpoint_paths
from fastbert.training.hardware import resolve_precision, setup_machine
from fastbert.training.options import MachineOptions

MICRO_BATCH = 64


def checkpoints(run: Path, last: bool = False) -> dict[int, Path]:
    """Steps and folders of the models of a run that are measured; with `last`, of the last one alone."""
    found = all_checkpoints(run)
    return dict(list(found.items())[-1:]) if last else found


def all_checkpoints(run: Path) -> dict[int, Path]:
    found = {int(path.name.rpartition("-")[2]): path for path in checkpoint_paths(run / "checkpoints")}
    if not found:
        exports = [path for path in run.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return dict(sorted((int(path.name.removeprefix("step-")), path) for path in exports))
    options = stored_options(str(run))
    wanted = {max(found), *(options.milestone_steps() if options.milestones else ())}
    return {step: path for step, path in sorted(found.items()) if step in wanted}


def is_trainers(run: Path) -> bool:
    """Report whether a run is one of pretrain_with_trainer.py."""
    return (run / "steps.jsonl").is_file()


def options_of(run: Path) -> PretrainOptions:
    """Options of a run by either program."""
    if is_trainers(run):
        return load_yaml(PretrainOptions, run / "config.yaml")
    return stored_options(str(run))


def masked_loss(model: Path, arguments: argparse.Namespace, machine: MachineOptions) -> dict[str, float]:
    """Loss (nats) and accuracy at masked positions of the first held-out rows; all masked ones show [MASK]."""
    device = torch.device("cpu")
    precision, _ = resolve_precision(machine.precision, device)
    pretrained = load_pretrained(model)
    vocabulary = tokenizer_of(pretrained)
    data = open_dataset(arguments.data)
    if vocabulary.fingerprint != data.fingerprint:
        raise UserError(f"{model} has another tokenizer than {arguments.data}; losses would not be comparable")
    objective = trained_objective(str(model), pretrained, vocabulary, machine.kernels, mask_rate=0.15)
    rows = PackedRows(data.split("validation"), arguments.length, vocabulary.ids["[CLS]"], vocabulary.ids["[SEP]"])
    count = min(arguments.sequences, len(rows))
    return evaluate(objective, validation_batches(rows, count, MICRO_BATCH, device), precision, sequences=count)


def measure(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    machine = MachineOptions(device="cpu", threads=arguments.threads)
    setup_machine(machine, torch.device("cpu"))
    found = masked_loss(model, arguments, machine)
    if arguments.pairs:
        pairs = measure_pairs(EvaluateOptions(model=str(model), pairs=arguments.pairs, machine=machine))
        found |= {"pairs": pairs["accuracy"], "pairs_count": pairs["count"]}
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [parse_json(line, f"{path}, line {number}", dict) for number, line in enumerate(lines, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", required=True, help="prepared text whose held-out documents are measured")
    parser.add_argument("--last", action="store_true", help="only the last checkpoint of each run")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (default: 64)")
    parser.add_argument("--sequences", type=int, default=4096, help="rows (default: 4096)")
    parser.add_argument("--pairs", help="minimal pairs, as in `fastbert evaluate --pairs`")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to append to")
    arguments = parser.parse_args()
    try:
        rows = read_rows(arguments.out)
        done = {(row["run"], row["step"]) for row in rows}
        for run in arguments.runs:
            models = checkpoints(run, arguments.last)
            if not models:
                raise UserError(f"{run} has no checkpoints and no exports")
            for step, model in models.items():
                if (str(run), step) in done:
                    continue
                rows.append({"run": str(run), "step": step, **measure(model, arguments)})
                with atomic_file(arguments.out) as file:
                    file.write("".join(f"{json_text(row)}\n" for row in rows).encode())
                echo(json_text(rows[-1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
