"""The YAML files that come with fastbert, by name: `fastbert pretrain tiny` works from any folder."""

import difflib
from pathlib import Path

from fastbert.errors import UserError, brief

PACKAGE = Path(__file__).parent
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Folders of configurations in an installed wheel and in a checkout."""


def config_path(job: str, name: str) -> str:
    """Path of the YAML file `name`: an existing path, or the name of a file in configs/<job>/.

    Raises:
        UserError: it is a plain name, such as `tiny`, but neither of these.
    """
    known = named_configs(job)
    stem = Path(name).stem
    if stem in known and name == f"{stem}.yaml" and not Path(name).exists():
        raise UserError(f"there is no file {name}; the configuration that comes with fastbert is called {stem}")
    if not known or Path(name).exists() or Path(name).suffix or not is_plain(name):
        return name
    if name in known:
        return str(known[name])
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"known names: {', '.join(known)}"
    raise UserError(f"there is no file {brief(name, str)} and no configuration of that name for fastbert {job}; {hint}")


def named_configs(job: str) -> dict[str, Path]:
    """The configurations of a job that come with fastbert: name -> path."""
    name = "pipelines" if job == "run" else job
    folder = next((folder for folder in FOLDERS if (folder / name).is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted((folder / name).glob("*.yaml"))}


def shipped(path: str) -> Path | None:
    """The file that comes with fastbert as `path`, such as configs/pretrain/tiny.yaml, or None."""
    first, *rest = Path(path).parts or ("",)
    if first != "configs" or ".." in rest:
        return None
    return next((file for folder in FOLDERS if (file := folder.joinpath(*rest)).is_file()), None)


def is_plain(name: str) -> bool:
    """Tests whether a name could be that of a configuration: not a path, not an option."""
    return name.replace("-", "").replace("_", "").isalnum()
