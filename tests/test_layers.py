"""Imports lead down the layers of docs/architecture.md, and nowhere in a circle.

Every import counts, wherever it stands: those in a function are there so that something heavy is loaded late, and those
for a type checker alone tie modules together as well. Names of modules in a registry do not count, nor does that Python
imports a package before its modules.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"data", "training"},
    {"model"},
    {"objectives"},
    {"hub", "report"},
    {"finetuning"},
    {"pretraining"},
    {"dataset_work"},
    {"studies", "bench"},
    {"cli", "__main__", "api"},
]
LAYER = {name: number for number, names in enumerate(LAYERS, 1) for name in names}  # other modules: 0, the kernels: -1
APART = {("finetuning", "pretraining"), ("pretraining", "finetuning"), ("studies", "bench"), ("bench", "studies")}
Graph = dict[str, set[str]]


def import_graph(*packages: Path) -> Graph:
    """Module -> the modules of these packages that it imports."""
    files = {}
    for package in packages:
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: {found for found in imported(name, path, files) if found in files} for name, path in files.items()}


def imported(name: str, path: Path, files: dict[str, Path]) -> Iterator[str]:
    parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (inner if (inner := f"{base}.{alias.name}") in files else base for alias in node.names)


def circles(graph: Graph) -> list[set[str]]:
    """Each set of modules that all import one another, by way of others or not."""
    number = {name: position for position, name in enumerate(graph)}
    edges = [(number[name], number[other]) for name, others in graph.items() for other in others]
    rows, columns = zip(*edges, strict=True)
    matrix = coo_array(([1] * len(edges), (rows, columns)), shape=(len(graph), len(graph)))
    count, label = connected_components(matrix, connection="strong")
    found = [{name for name, own in zip(graph, label, strict=True) if own == circle} for circle in range(count)]
    return [names for names in found if len(names) > 1]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(ROOT / "fastbert", ROOT / "kernels" / "fastbert_kernels")


def part(name: str) -> str:
    """fastbert.data.stages -> data."""
    return name.split(".")[1] if name.startswith("fastbert.") else name.split(".")[0]


def test_imports_lead_downwards(graph) -> None:
    layers = {**LAYER, "fastbert_kernels": -1}
    edges = [(name, other) for name, others in graph.items() for other in others]
    upwards = [
        f"{name} imports {other}"
        for name, other in edges
        if layers.get(part(other), 0) > layers.get(part(name), 0) or (part(name), part(other)) in APART
    ]
    assert not upwards
    seen = {(part(name), part(other)) for name, other in edges}
    assert {("studies", "finetuning"), ("data", "errors"), ("model", "fastbert_kernels")} <= seen


def test_sweep_and_ablate_stand_on_the_engine_and_not_on_each_other(graph) -> None:
    layer = {"engine": 1, "shared": 2, "sweep": 3, "ablate": 3, "active": 3, "affinity": 3, "pipelines": 3}
    edges = {
        (name.split(".")[2], other.split(".")[2])
        for name, others in graph.items()
        for other in others
        if name.startswith("fastbert.studies.") and other.startswith("fastbert.studies.")
    }
    assert not [edge for edge in edges if layer[edge[1]] >= layer[edge[0]] and edge[0] != edge[1]]
    assert {
        ("sweep", "engine"),
        ("ablate", "engine"),
        ("ablate", "shared"),
        ("active", "engine"),
        ("pipelines", "engine"),
        ("shared", "engine"),
    } <= edges


def test_no_circles(graph) -> None:
    assert not [sorted(names) for names in circles(graph)]


def test_circles_are_found(tmp_path) -> None:
    """Through functions, packages, relative imports and type checking; a package may import its modules."""
    for name, text in {
        "__init__": "from toy.a import f",
        "a": "def f():\n    from toy import b",
        "b": "from . import c",
        "c": "if TYPE_CHECKING:\n    from toy.inner.d import g",
        "inner/__init__": "from ..e import h",
        "inner/d": "import toy.a",
        "e": "import os",
        "back": "from toy import f",
    }.items():
        path = tmp_path / "toy" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    graph = import_graph(tmp_path / "toy")
    assert graph["toy.inner"] == {"toy.e"} and graph["toy.back"] == {"toy"} and graph["toy.e"] == set()
    assert circles(graph) == [{"toy.a", "toy.b", "toy.c", "toy.inner.d"}]
    (tmp_path / "toy" / "a.py").write_text("from toy.back import f")
    assert circles(import_graph(tmp_path / "toy")) == [{"toy", "toy.a", "toy.back"}]
