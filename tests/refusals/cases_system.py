"""Links that lead back to themselves, locks that are none, devices; and what was typed first is reported first."""

import os
import socket
from pathlib import Path


def files(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "nowhere.txt").symlink_to("gone.txt")
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo(folder / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket is short
        made.bind("socket.txt")
        os.chdir(here)
    (folder / "a.txt").write_text("words\n")
    (folder / "a.jsonl").write_text('{"text": "words"}\n')
    (folder / "model").mkdir()
    for name in ("locked", "piped", "linked"):
        (folder / name).mkdir()
    (folder / "locked" / ".lock").mkdir()
    os.mkfifo(folder / "piped" / ".lock")
    (folder / "linked" / ".lock").symlink_to("../a.txt")
    (folder / "sweep.yaml").write_text("models: [model]\ntasks: [cola]\n")


CASES = [
    # links, devices
    ("prepare --source loop.txt --out o", "loop.txt is a link that leads back to itself"),
    ("prepare --source nowhere.txt --out o", "nowhere.txt does not exist"),
    ("prepare --source pipe.txt --out o", "pipe.txt is a pipe or a device"),
    ("prepare --source socket.txt --out o", "socket.txt is a socket or a device"),
    ("prepare --source /dev/zero --out o", "/dev/zero is a pipe or a device"),
    ("prepare --source a.txt --out loop/o", "a link in that path leads back to itself"),
    ("prepare --source a.txt --out a.txt/o", "part of that path is a file"),
    ("export loop --out o", "no folder loop"),
    ("export model --out loop", "cannot export to loop"),
    ("predict --model model --source loop.jsonl --out o", "loop.jsonl is a link that leads back to itself"),
    ("predict --model model --source pipe.jsonl --out o", "pipe.jsonl is a pipe or a device"),
    ("evaluate --model model --source loop.txt", "loop.txt is a link that leads back to itself"),
    # locks
    ("sweep sweep.yaml --out locked", "the lock locked/.lock is not a file; remove it"),
    ("sweep sweep.yaml --out piped", "the lock piped/.lock is not a file; remove it"),
    ("sweep sweep.yaml --out linked", "the lock linked/.lock is a link; remove it"),
    # what was typed first
    ("finetune --model nothere", "there is no folder nothere"),
    ("finetune --model nothere --task alsonot --out o", "there is no folder nothere"),
    ("finetune --model a.txt --task alsonot --out o", "a.txt is a file; give the folder of the model"),
    ("finetune --init-from nothere --task cola,rte --out o", "there is no folder nothere"),
    ("finetune --model model --task cola --out o --glue-dir nothere", "no GLUE folder nothere"),
    ("finetune --model model --task alsonot --out o", "alsonot"),
    ("predict --model nothere --source alsonot.jsonl --out o", "there is no folder nothere"),
    ("predict --model model --source alsonot.jsonl --out o", "alsonot.jsonl does not exist"),
    ("predict --model model --task cola --glue-dir nothere --out o", "no GLUE folder nothere"),
    ("predict --model model --source a.jsonl --out a.txt/o", "part of that path is a file"),
    ("evaluate --model nothere --source alsonot.txt", "there is no folder nothere"),
    ("evaluate --model model --source alsonot.txt", "source 'alsonot.txt' does not exist"),
    ("export nothere --out a.txt", "there is no folder nothere"),
    ("export model --out a.txt", "cannot export to a.txt: it is a file"),
    ("submit --models cola=nothere --out a.txt/o.zip", "there is no folder nothere"),
    ("submit --models cola=model --glue-dir nothere --out o.zip", "no GLUE folder nothere"),
]
