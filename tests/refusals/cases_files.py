"""Inputs that cannot be read."""

import os
from pathlib import Path


def files(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    (folder / "latin.yaml").write_bytes("seed: 1 # Größe\n".encode("latin1"))
    (folder / "folder.yaml").mkdir()
    (folder / "small.yaml").write_text("length: 32\n")


CASES = [
    ("pretrain pipe.yaml", "configuration file pipe.yaml is a pipe or a device, not a file"),
    ("pretrain loop.yaml", "configuration file loop.yaml is a link that leads back to itself"),
    ("finetune latin.yaml", "configuration file latin.yaml is not UTF-8 text (byte 0xf6, line 1)"),
    ("pretrain folder.yaml", "configuration file folder.yaml is a folder; give a file"),
    ("sweep smal.yaml", "configuration file smal.yaml does not exist; did you mean 'small.yaml'?"),
    ("ablate /dev/zero", "configuration file /dev/zero is a pipe or a device, not a file"),
]
