"""Digits of other scripts, folders of the kernel's, options without effect, and pickles that run code."""

import json
import os
import pickle
from pathlib import Path

from tests.refusals.cases_bounded import CONFIG


class _Command:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def files(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "a.txt").write_text("words\n\nmore words\n")
    (folder / "b.txt").write_text("words\n\nmore words\n")
    (folder / "a.zip").write_bytes(b"")
    (folder / "t.csv").write_text("text,label\na,x\nb,y\n")
    (folder / "task.yaml").write_text("train: t.csv\ndev: t.csv\n")
    (folder / "sweep.yaml").write_text("models: [model]\ntasks: [task.yaml]\n")
    (folder / "ablate.yaml").write_text("base: {data: a.txt, steps: 9}\nvariants: {a: , b: {norm: pre}}\n")
    (folder / "tasks.yaml").write_text("base: {data: a.txt, steps: 9}\nvariants: {a: , b: {norm: pre}}\ntasks: 0\n")
    (folder / "code").mkdir()
    (folder / "code" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "code" / "pytorch_model.bin").write_bytes(pickle.dumps(_Command()))


CASES = [
    ("evaluate --model model --source a.txt --machine.device cuda:٣", "unknown device 'cuda:٣'"),
    ("finetune --model model --machine.threads ٣", "--machine.threads must be a whole number, not '٣'"),
    ("prepare --source a.txt,b.txt --weights ٠.٥,٠.٥ --out o", "are not comma-separated numbers"),
    ("prepare --source a.txt,b.txt --weights 0.5,0_0.5 --out o", "are not comma-separated numbers"),
    ("prepare --source hf:/ --out o", "source 'hf:/' names no dataset"),
    ("sweep sweep.yaml --glue-dir nothere --out o", "no GLUE folder nothere"),
    ("ablate ablate.yaml --glue-dir nothere --out o", "no GLUE folder nothere"),
    ("ablate tasks.yaml --out o", "tasks.yaml: tasks must be a list"),
    ("export --run model --out /proc/x", "no folder can be created at /proc/x; choose another one"),
    ("submit --results model --out /proc/x.zip", "no folder can be created at /proc/x.zip; choose another one"),
    ("submit --check a.zip --fill", "--check only reads an archive; leave out all other options"),
    ("submit --check a.zip --glue-dir model", "--check only reads an archive; leave out all other options"),
    ("export --run code --out o", "holds more than tensors (Weights only load failed); download it again"),
]
