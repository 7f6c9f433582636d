"""JSON has neither NaN nor infinities: null stands for them, and nothing writes JSON by another road."""

import ast
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.records import finite_or_none, json_text, write_json
from fastbert.training.logbook import Logbook

ROOT = Path(__file__).parents[1]
NUMBERS = st.one_of(st.floats(), st.integers(), st.none(), st.booleans(), st.text(max_size=3))
VALUES = st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner))
HASHED = (
    "config.py",
    "checkpoints.py",
    "tokenizer.py",
    "tokenizer_folders.py",
    "setup.py",
    "prepare.py",
    "records.py",
    "tensors.py",
)
"""Files that hash what json.dumps gives."""


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} in JSON")


@given(VALUES)
@settings(max_examples=100)
def test_null_stands_for_what_is_not_finite(value) -> None:
    def same(before, after) -> bool:
        if isinstance(before, dict):
            return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
        if isinstance(before, list):
            return len(before) == len(after) and all(map(same, before, after))
        if isinstance(before, float) and not math.isfinite(before):
            return after is None
        return before == after and type(before) is type(after)

    assert same(value, json.loads(json_text(value), parse_constant=refuse))
    assert same(value, finite_or_none(value))


def test_what_writes_files(tmp_path) -> None:
    row = {"loss": math.nan, "more": [math.inf, (1.5, -math.inf)]}
    write_json(tmp_path / "a.json", row)
    with Logbook(tmp_path, 2, quiet=True) as logbook:
        logbook.log(1, "train", {"loss": math.nan, "accuracy": 0.5})
    for name, expected in (("a.json", {"loss": None, "more": [None, [1.5, None]]}), ("metrics.jsonl", None)):
        found = json.loads((tmp_path / name).read_text(), parse_constant=refuse)
        assert found == (expected or {"step": 1, "split": "train", "loss": None, "accuracy": 0.5})


@pytest.mark.parametrize("folder", ["fastbert", "scripts", "kernels"])
def test_no_other_road_to_json(folder: str) -> None:
    """json.dump and json.dumps write NaN by default."""
    bad = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(tree := ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps")):
                continue
            strict = any(word.arg == "allow_nan" and ast.unparse(word.value) == "False" for word in node.keywords)
            hashed = path.name in HASHED and "sha256" in ast.unparse(enclosing(tree, node))
            if not strict and not hashed:
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not bad


def enclosing(tree: ast.Module, node: ast.Call) -> ast.AST:
    """The function in which a call stands."""
    functions = [part for part in ast.walk(tree) if isinstance(part, ast.FunctionDef)]
    return max((part for part in functions if node in ast.walk(part)), key=lambda part: part.lineno)
