"""Labelling functions in a user's Python file, which is executed only if --run-python names it."""

import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

from fastbert.errors import UserError, brief, nearest
from fastbert.finetuning.weak.functions import Function, Item, cell_text
from fastbert.finetuning.weak.label_models import ABSTAIN
from fastbert.inputs import read_text_input
from fastbert.streams import echo

MODULE = "labelling_functions"  # the name of the file as a module


def run_python_file(path: str, labels: Sequence[str]) -> list[Function]:
    """Executes a file and returns its functions, in their order: those defined in it without a leading _ in the name.

    Raises:
        UserError: the file raises an exception or defines no function.
    """
    read_text_input(path, "Python file")
    echo(f"executing {path}, as --run-python asks")
    spec = importlib.util.spec_from_loader(MODULE, importlib.machinery.SourceFileLoader(MODULE, str(path)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else line_of(error, path)
        raise UserError(f"{path}{line}: {described(error)}; fix the file") from None
    finally:
        sys.dont_write_bytecode = writes
        del sys.modules[MODULE]
    found = [
        Function(name, vote_of(path, name, value, labels), where=f"{path}: ")
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == MODULE and not name.startswith("_")
    ]
    if not found:
        raise UserError(f"{path} defines no function; define functions of a row that return a label or None")
    return found


def vote_of(path: str, name: str, function: Callable[[dict[str, Any]], Any], labels: Sequence[str]) -> Any:
    """Function (item) -> label id that calls the user's `function`."""

    def vote(item: Item) -> int:
        try:
            found = cell_text(function({"text": item.text, "pair": item.pair}))
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{path}{line_of(error, path)}: function {name}, at {item.where}: {described(error)}; fix the "
                "function, or begin its name with _ if it does not label"
            ) from None
        if found is None:
            return ABSTAIN
        if found not in labels:
            raise UserError(
                f"{path}: function {name}, at {item.where}, returns {brief(found)}, which is not a label of the task; "
                f"{nearest(found, labels)}"
            )
        return labels.index(found)

    return vote


def line_of(error: BaseException, path: str) -> str:
    """The last line of the file in the traceback, for messages."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(path)]
    return f", line {lines[-1]}" if lines else ""


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {brief(str(error), str)}"
