"""Packages import only from the layers below their own, as docs/architecture.md says."""

import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "fastbert"
LAYERS = [
    {"data", "training"},
    {"model"},
    {"objectives"},
    {"hub"},
    {"finetuning"},
    {"pretraining"},
    {"studies", "bench"},
    {"cli", "__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS, 1) for name in names}  # other modules: 0
APART = {("finetuning", "pretraining"), ("pretraining", "finetuning"), ("studies", "bench"), ("bench", "studies")}


def test_imports_lead_downwards() -> None:
    upwards, seen = [], set()
    for path in FOLDER.rglob("*.py"):
        own = path.relative_to(FOLDER).parts[0].removesuffix(".py")
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"^\s*(?:from|import) fastbert\.(\w+)", text, re.MULTILINE):
            seen.add((own, name))
            if LAYER.get(name, 0) > LAYER.get(own, 0) or (own, name) in APART:
                upwards.append(f"{path.relative_to(FOLDER)} imports {name}")
    assert not upwards
    assert ("studies", "finetuning") in seen and ("data", "errors") in seen
