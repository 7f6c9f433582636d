"""Code of an export: modeling_fastbert.py with the source of the model's position encoding. Transformers runs it
without fastbert, by the same definition."""

import ast
import hashlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastbert.errors import UserError
from fastbert.hub.names import is_bert
from fastbert.model.config import EncoderConfig
from fastbert.model.positions import POSITIONS

CONFIGURATION, MODEL = "configuration_fastbert.py", "modeling_fastbert.py"
IMPORT = "from .positions_fastbert import POSITION_NAME, Position, rotate\n"
"""Line of modeling_fastbert.py that is replaced by the source of the encoding."""
BUNDLED = ("fastbert.model.positions", "fastbert_kernels")
"""Packages whose modules are copied into an export if an encoding imports them."""
PROBED = 8  # positions with which an encoding is tested; the memory of a bias grows with their square
ANNOTATIONS = "from fastbert.model.config import EncoderConfig"
"""Import that is removed, because annotations are not evaluated."""


def export_code(position: str) -> dict[str, str]:
    """Code files of an export with the encoding `position`, by name. Raises the UserError of `encoding_source`."""
    before, line, after = _own_file(MODEL).partition(IMPORT)
    if not line:
        raise RuntimeError(f"{MODEL} lacks the line {IMPORT!r}")
    source = encoding_source(position) + f'\nPOSITION_NAME = "{position}"\nPosition = {POSITIONS[position].__name__}\n'
    model = before + source + after
    # Transformers names the module of a configuration by a hash of its text, and uses one model class for all models
    # with that configuration. So the configuration must differ where the model's code does.
    mark = f"\n# SHA-256 of {MODEL}: {hashlib.sha256(model.encode()).hexdigest()}\n"
    return {CONFIGURATION: _own_file(CONFIGURATION) + mark, MODEL: model}


def check_exportable(config: EncoderConfig) -> None:
    """Raises a UserError if the source of the position encoding needs fastbert when it runs in an export."""
    if is_bert(config):
        return
    names: dict[str, Any] = {"__name__": "modeling_fastbert"}
    short = min(config.max_positions, PROBED)
    given = SimpleNamespace(**config.to_dict() | {"max_positions": short}, head_size=config.head_size)
    try:
        exec("from __future__ import annotations\n" + encoding_source(config.position), names)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            encoding = names[POSITIONS[config.position].__name__](given)
            for method in (encoding.embed, encoding.bias, encoding.rotation):
                for position_ids in (None, torch.zeros(1, 1, dtype=torch.int64)):
                    method(1, position_ids)
    except (NameError, AttributeError) as error:
        raise _refusal(config.position, f"without fastbert its code fails with `{error}`") from None
    for name, _ in encoding.named_buffers():
        if "." in name and name not in encoding.state_dict():
            raise _refusal(config.position, f"its buffer {name} is not saved and belongs to a submodule")


def encoding_source(position: str) -> str:
    """Source of the modules that define the encoding, each after its dependencies.

    Raises:
        UserError: they import something that an export cannot import, or define a name twice.
    """
    imports: dict[str, None] = {}
    parts: dict[str, str] = {}
    definitions = dict.fromkeys(_definitions(ast.parse(_own_file(MODEL))), MODEL)

    def add(module: str) -> None:
        spec = find_spec(module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            raise _refusal(position, f"{module} has no source file")
        source = Path(spec.origin).read_text(encoding="utf-8")
        tree, lines = ast.parse(source), source.splitlines()
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)):
            statement, outermost = ast.unparse(node), node in tree.body
            if outermost:
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
                if _is_available(node):
                    imports[statement] = None
                elif _is_bundled(node) and node.module not in parts:
                    add(node.module)
            if not (_is_available(node) or (outermost and (statement == ANNOTATIONS or _is_bundled(node)))):
                raise _refusal(position, f"{spec.origin}, line {node.lineno}, is `{statement}`")
        for name in _definitions(tree):
            if (other := definitions.setdefault(name, spec.origin)) != spec.origin:
                raise _refusal(position, f"both {other} and {spec.origin} define {name}")
        parts[module] = re.sub(r"\n{3,}", "\n\n\n", "\n".join(lines)).strip() + "\n"

    add(POSITIONS[position].__module__)
    imports.pop("from __future__ import annotations", None)
    title = f"# {117 * '-'}\n# The position encoding {position}, from the modules that define it.\n"
    return "\n".join([*sorted(imports), "", title, "\n\n".join(parts.values())])


def _own_file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _is_available(node: ast.Import | ast.ImportFrom) -> bool:
    """True if a statement imports from torch or the standard library."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    roots = {name.partition(".")[0] for name in names}
    return roots <= {"torch", *sys.stdlib_module_names} and not getattr(node, "level", 0)


def _is_bundled(node: ast.Import | ast.ImportFrom) -> bool:
    """True if a statement imports names from a module that is copied into the export."""
    if not isinstance(node, ast.ImportFrom) or node.level or any(alias.asname for alias in node.names):
        return False
    return node.module.startswith(BUNDLED)


def _definitions(tree: ast.Module) -> set[str]:
    """Names that a module defines, without those it imports."""
    found = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return found | {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _refusal(position: str, problem: str) -> UserError:
    return UserError(
        f"position {position} cannot be exported: {problem}. An export carries the source of its position encoding, "
        "which may import torch, the standard library and, as `from MODULE import NAME`, fastbert.model.positions and "
        "fastbert_kernels; docs/extending.md has an example"
    )
