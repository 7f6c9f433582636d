"""User errors: each command line ends with exit code 2, a line that states the problem, and nothing left behind.

The modules `cases_*` next to this one hold the cases: `CASES`, a list of (arguments, a part of the message), and
`files(folder)`, which makes the small input files that their arguments name.
"""

import importlib.util
import shlex
from pathlib import Path

import pytest

from fastbert.cli import main

MODULES = []
for _path in sorted(Path(__file__).parent.glob("cases_*.py")):
    _spec = importlib.util.spec_from_file_location(_path.stem, _path)
    MODULES.append(importlib.util.module_from_spec(_spec))
    _spec.loader.exec_module(MODULES[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {module.__name__: tmp_path_factory.mktemp(module.__name__) for module in MODULES}
    for module in MODULES:
        module.files(made[module.__name__])
    return made


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [(module.__name__, arguments, message) for module in MODULES for arguments, message in module.CASES],
)
def test_user_error(module: str, arguments: str, message: str, folders: dict[str, Path], monkeypatch, capfd) -> None:
    folder = folders[module]
    monkeypatch.chdir(folder)
    before = tree(folder)
    capfd.readouterr()
    try:
        code = main(shlex.split(arguments))
    except SystemExit as ended:
        code = ended.code
    printed = capfd.readouterr()
    assert code == 2, printed
    assert message in printed.err
    assert "Traceback" not in printed.err
    last = printed.err.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ") and message in last  # one line, the last one
    assert len(last) < 2500
    assert printed.out == ""
    assert tree(folder) == before


def tree(folder: Path) -> set[tuple[str, int]]:
    """All that lies in `folder`: (path, bytes)."""
    return {(str(path), path.lstat().st_size) for path in folder.rglob("*")}
