"""docs/NAME.svg: what commands print on a terminal of that width.

python docs/shoot.py [--width 100] NAME COMMAND [COMMAND…]
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

LINES = 50


def recorder(width: int) -> Console:
    """A console that prints nowhere and remembers it."""
    return Console(record=True, width=width, file=io.StringIO(), highlight=False)


def save(console: Console, name: str) -> None:
    """docs/NAME.svg. It loads nothing from elsewhere: rich would have its font fetched from the internet."""
    svg = console.export_svg(title="raylaunch")
    svg = re.sub(r"\s*(@font-face \{.*?\}|<!--.*?-->)", "", svg, flags=re.DOTALL)
    Path(__file__).with_name(f"{name}.svg").write_text(svg)


def output(command: str, width: int) -> str:
    """What a terminal shows when the command is done. It is run on one, so that it does what it does for people."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, width, 0, 0))
    environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        command, shell=True, stdin=writer, stdout=writer, stderr=writer, env=environ | {"TERM": "xterm-256color"}
    )
    os.close(writer)
    read = bytearray()
    while True:
        try:
            read += os.read(reader, 65536)
        except OSError:  # how Linux says that nobody writes any more
            break
    os.close(reader)
    process.wait()
    return _at_the_end(read.decode())


def _at_the_end(text: str) -> str:
    """Without the live lines that were overwritten."""
    text = re.sub(r"\x1b\[\?25[lh]", "", text.replace("\r\n", "\n"))
    text = re.sub(r"[^\n]*\r\x1b\[2K", "", text)
    return re.sub(r"[^\n]*\n\r\x1b\[1A\x1b\[2K", "", text)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("name")
    options.add_argument("commands", nargs="+", metavar="COMMAND")
    options.add_argument("--width", type=int, default=100, help="columns of the terminal")
    given = options.parse_args()
    console = recorder(given.width)
    for number, command in enumerate(given.commands):
        if number:
            console.print()
        console.print(Text.assemble(("$ ", "dim"), (command, "bold")))
        console.print(Text.from_ansi(output(command, given.width).rstrip()))
    save(console, given.name)


if __name__ == "__main__":
    main()
