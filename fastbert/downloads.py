"""Models and tokenizers on the Hugging Face hub, by their names: `owner/name`, `owner/name@revision`, or the short name
of a known release. The newest commit of the revision is downloaded to the hub's cache, and its folder there is used.

Only safetensors weights, their index, configurations and tokenizers are downloaded: no code and no pickles.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastbert.errors import UserError, brief
from fastbert.files import disk_errors
from fastbert.inputs import input_errors, near_name
from fastbert.lists import paths
from fastbert.progress import Progress, progress
from fastbert.system_errors import reason

Options = TypeVar("Options")

MODEL, TOKENIZER = "model", "tokenizer"
FROM_HUB = {"hub": MODEL}
"""Metadata of an option that may name models on the hub, separated by commas; in a tuple, TASK= may precede them."""
TOKENIZER_FROM_HUB = {"hub": TOKENIZER}
"""Metadata of an option that may name a tokenizer on the hub."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model"),
)
"""Files that transformers reads a tokenizer from."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
FILES = {
    MODEL: ("config.json", "task.json", *_WEIGHTS, *TOKENIZER_FILES),
    TOKENIZER: ("config.json", *TOKENIZER_FILES),
}
"""Files that are downloaded; task.json describes a model that `fastbert finetune` has trained."""

_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<name>{_PART}(?:/{_PART})?)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_STEP = re.compile(r"[0-9]{1,10}")  # of a checkpoint of a run
_FOLDERS = ("runs", "results", "data", "models", "checkpoints", "exports", "out", "output", "outputs")
"""Folders that are no owners on the hub: runs/base is a run, also where there is no folder runs yet."""
_RELEASES = {
    r"bert-(base|large)-[\w-]+": "google-bert",
    r"(xlm-)?roberta-(base|large)": "FacebookAI",
    r"distil(bert|roberta)-base[\w-]*": "distilbert",
}
"""Short names of releases -> owner."""


@dataclass(frozen=True)
class HubName:
    """A repository on the hub."""

    repository: str
    """owner/name."""
    revision: str | None = None
    """Branch, tag or commit; None for the default branch."""

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def download(self) -> str:
        """The command that downloads it."""
        return f"hf download {self.repository}" + ("" if self.revision is None else f" --revision {self.revision}")


def hub_name(path: str | Path) -> HubName | None:
    """The repository that `path` names; None if it is a path: it exists, or the folder above it does or is one of
    _FOLDERS, or it has another form."""
    found = _NAME.fullmatch(str(path))
    if found is None or os.path.lexists(path):
        return None
    name, revision = found["name"], found["revision"]
    if revision is not None and _STEP.fullmatch(revision):
        return None
    if "/" not in name:
        owner = next((owner for pattern, owner in _RELEASES.items() if re.fullmatch(pattern, name)), None)
        return None if owner is None else HubName(f"{owner}/{name}", revision)
    above = name.partition("/")[0]
    if above in _FOLDERS or os.path.isdir(above) or "--" in name or ".." in name or name.endswith(".git"):
        return None
    return HubName(name, revision)


def check_downloaded(path: str | Path, what: str, kinds: str) -> Path:
    """Checks that `path` is a folder or the name of a repository on the hub, and returns it. Downloads nothing.

    Args:
        what: its content, MODEL or TOKENIZER.
        kinds: description of suitable folders, for the error message.

    Raises:
        UserError: it is a path that does not exist.
    """
    of_hub = ", or owner/name of a repository on the Hugging Face hub" if _NAME.fullmatch(str(path)) else ""
    named = hub_name(path)  # "./x" is a path, and Path drops the dot
    path = Path(path)
    with input_errors(path):
        found = path.is_dir()
    if found or named is not None:
        return path
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder of the {what}")
    name = brief(path, str)
    if step := re.fullmatch(r"(.+)@([0-9]{1,10})", str(path)):
        checkpoint = f"{brief(step[1], str)}/checkpoints/step-{int(step[2]):08d}"
        raise UserError(f"there is no folder {name}; for a checkpoint of a run give its folder, {checkpoint}")
    near = near_name(path)
    give = " Give" if near.endswith("?") else "; give"
    raise UserError(f"there is no folder {name}{near}{give} the folder of {kinds}{of_hub}")


def with_downloads(value: Options) -> Options:
    """Options, or a study, in which the folder of the download replaces each name of a repository on the hub. The
    folder's path names repository and commit.

    Raises:
        UserError: a repository cannot be downloaded, or has no weights in safetensors files.
    """
    if is_dataclass(value) and not isinstance(value, type):
        changed = {}
        for field in dataclasses.fields(value):
            old = getattr(value, field.name)
            kind = field.metadata.get("hub")
            new = with_downloads(old) if kind is None or not isinstance(old, str | tuple) else _downloaded(old, kind)
            if new is not old and new != old:
                changed[field.name] = new
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(with_downloads, value))
    if isinstance(value, Mapping) and any(map(is_dataclass, value.values())):
        return {key: with_downloads(item) for key, item in value.items()}
    return value


def _downloaded(given: str | tuple[str, ...], kind: str) -> str | tuple[str, ...]:
    """The value of an option, with folders instead of names on the hub."""
    if isinstance(given, tuple):  # of task=models
        parts = [one.rpartition("=") if re.match(r"\w+=[^=]*$", one) else ("", "", one) for one in given]
        return tuple(f"{task}{equals}{_downloaded(names, kind)}" for task, equals, names in parts)
    found = paths(given, os.path.isdir)
    folders = [str(local_folder(name, kind)) for name in found]
    return given if folders == found else ",".join(folders)


def local_folder(path: str | Path, what: str = MODEL) -> Path:
    """The folder of the download if `path` names a repository on the hub, else `path`.

    Raises:
        UserError: as in `with_downloads`.
    """
    name = hub_name(path)
    if name is None:
        return Path(path)
    folder = _snapshot(name, str(path), what)
    if what == MODEL:
        _check_model(folder, name)
    elif not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(f"{name} on the Hugging Face hub has no tokenizer; give another")
    return folder


def _snapshot(name: HubName, given: str, what: str) -> Path:
    """Downloads what is not in the cache yet, and returns the folder of the commit. If the hub cannot be reached, the
    commit that the cache knows is used. Processes that want the same file wait for the first one."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    also = f"there is no folder {brief(given, str)}, and "
    where = f"the model {brief(str(name), str)} on the Hugging Face hub"
    try:
        with disk_errors(constants.HF_HUB_CACHE), progress(f"downloading {name}") as work:
            return Path(
                huggingface_hub.snapshot_download(
                    name.repository,
                    revision=name.revision,
                    allow_patterns=list(FILES[what]),
                    tqdm_class=_bar(work),
                )
            )
    except errors.GatedRepoError:
        raise UserError(
            f"{also}{where} needs its owner's permission: accept the terms on its page, then log in with `hf auth "
            "login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{also}{where} does not exist or is private; check the spelling, or log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{also}{where} has no such revision; give a branch, a tag or a commit after the @, or leave it out"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{also}{_unreachable(name, error)}") from None
    except errors.HFValidationError:
        raise UserError(f"{also}{brief(str(name), str)} cannot be a name on the Hugging Face hub; fix it") from None
    except Exception as error:  # of the connection, whose classes huggingface_hub does not export; others are raised
        if isinstance(error, UserError) or (isinstance(error, OSError) and reason(error)):
            raise
        if not isinstance(error, OSError | errors.XetDownloadError) and "httpx" not in type(error).__module__:
            raise
        raise UserError(
            f"the download of {where} failed ({brief(str(error).strip().partition(chr(10))[0], str)}); repeat the "
            f"command, which continues it, or run `{name.download}` first"
        ) from None


def _unreachable(name: HubName, error: Exception) -> str:
    """Describes why a repository is not available, and the remedy."""
    from huggingface_hub import constants

    download = f"`{name.download}`"
    if constants.HF_HUB_OFFLINE:
        return (
            f"the cache of the Hugging Face hub in {constants.HF_HUB_CACHE} does not hold {name}, and HF_HUB_OFFLINE "
            f"is set; unset it, or run {download} where there is a network"
        )
    cause = error.__cause__ or error
    return (
        f"the Hugging Face hub, where {name} may be, cannot be reached ({brief(str(cause).partition(chr(10))[0], str)})"
        f"; check the path and the network, or run {download} on a machine with one and copy the cache, "
        f"{constants.HF_HUB_CACHE}"
    )


def _bar(work: Progress) -> type:
    """A class in place of the hub's bars: passes the bytes to `work` and shows nothing itself."""
    from huggingface_hub.utils import tqdm

    class Bytes(tqdm):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self.counted = keywords.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*arguments, **{**keywords, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.counted:
                work.total = int(self.total or 0)
                work.update(work.done + int(n or 0))

    return Bytes


def _check_model(folder: Path, name: HubName) -> None:
    """Raises a UserError if the commit in `folder` lacks its configuration or has no weights in safetensors files."""
    from huggingface_hub import constants

    if not (folder / "config.json").is_file():
        raise UserError(f"{name} on the Hugging Face hub has no config.json, so it holds no model; give another")
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"the cache in {constants.HF_HUB_CACHE} holds {name} of the Hugging Face hub without model.safetensors; "
            f"unset HF_HUB_OFFLINE, or run `{name.download}` where there is a network"
        )
    raise UserError(
        f"{name} on the Hugging Face hub has no model.safetensors, and other files of weights may contain code; open "
        f"https://huggingface.co/spaces/safetensors/convert, then give {name.repository}@refs/pr/N, or download and "
        "convert it yourself: from_pretrained and save_pretrained of transformers, and give that folder"
    )


def commit_of(folder: Path) -> str | None:
    """owner/name@commit of a download in the hub's cache; None for any other folder."""
    cache = re.fullmatch(r"models--(.+)", folder.parent.parent.name)
    if cache is None or folder.parent.name != "snapshots":
        return None
    return f"{cache[1].replace('--', '/')}@{folder.name}"


def shown_folder(folder: Path) -> str:
    """`folder` for messages and records: `commit_of` it, or its path."""
    return commit_of(folder) or str(folder)
