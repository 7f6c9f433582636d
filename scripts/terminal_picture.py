"""A picture of a command in a terminal, as SVG: what the terminal shows at the end of the command.

python3 scripts/terminal_picture.py --out docs/terminal.svg -- fastbert pretrain tiny --out /tmp/run
"""

import argparse
import os
import pty
import re
import struct
import subprocess
import termios
from fcntl import ioctl
from pathlib import Path

from rich.console import Console
from rich.text import Text

CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07]*\x07")


def record(command: list[str], columns: int) -> str:
    """Everything that a command writes to a terminal of this many columns."""
    reader, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "FORCE_COLOR": "1"}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    parts = []
    while True:
        try:
            part = os.read(reader, 65536)
        except OSError:  # Linux reports the end of a terminal as an input/output error
            break
        if not part:
            break
        parts.append(part)
    if process.wait():
        raise SystemExit(f"{command[0]} ended with exit code {process.returncode}")
    return b"".join(parts).decode()


def screen(output: str) -> list[str]:
    """The lines that a terminal shows after `output`, with their colors: applies carriage returns, cursor up and the
    erasing of lines, which progress bars use."""
    lines, row, fresh = [""], 0, False
    for part in re.split(r"(\n|\r|\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07)", output):
        found = CONTROL.fullmatch(part)
        if part == "\n":
            row, fresh = row + 1, False
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            fresh = True  # what follows overwrites the line
        elif found and found[2] == "A":
            row = max(0, row - int(found[1] or 1))
        elif found and found[2] == "K":
            lines[row] = ""
        elif found is None or found[2] == "m":
            if fresh and part:
                lines[row], fresh = "", False
            lines[row] += part
    return [line.rstrip() for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--columns", type=int, default=110)
    parser.add_argument("--prompt", help="the command as the picture shows it (default: the command)")
    parser.add_argument("--title", default="fastbert")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    shown = screen(record(arguments.command, arguments.columns))
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(
            record=True, width=arguments.columns, file=nowhere, force_terminal=True, color_system="truecolor"
        )
        console.print(f"[bold green]$[/] [bold]{arguments.prompt or ' '.join(arguments.command)}[/]")
        for line in shown:
            console.print(Text.from_ansi(line))
    svg = console.export_svg(title=arguments.title, unique_id="fastbert")
    svg = re.sub(
        r',\s*url\("https?:[^)]*\) format\("\w+"\)', "", svg
    )  # a local font, or the viewer's: nothing is loaded
    arguments.out.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
