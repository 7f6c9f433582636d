"""The cache of the Hugging Face hub, filled without a network in the layout that huggingface_hub reads."""

import hashlib
from pathlib import Path


def fill_cache(cache: Path, repository: str, folder: Path, commit: str, revision: str = "main") -> Path:
    """Puts the files of `folder` into `cache` as a commit of a repository, which becomes the head of `revision`.

    Returns:
        The folder of the commit.
    """
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    (root / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    return snapshot
