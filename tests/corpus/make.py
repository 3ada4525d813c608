"""Causes the failures whose logs `raylaunch why` is measured on: one script of cases/ each, run for real.

    python tests/corpus/make.py NAME…            # shell cases: torch on this machine
    python tests/corpus/make.py --slurm NAME…    # those that need Slurm: a sandbox is made, and removed at the end

Each script says in its head what verdict it deserves (`# expect: KIND rank=R host=H`), and whether it is typed into a
shell (`# how: shell`, or `login` where Slurm's commands are) or given to sbatch (`# how: sbatch OPTIONS`). What a person
would have of it replaces the log in tests/unit/data: a third of the names, by their hash, in why-real-aside.
Changes nothing of what was printed but the places of the work directory, of the venv and of Python.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CASES = HERE / "cases"
ROOT = HERE.parents[1]
DATA = ROOT / "tests/unit/data"
WORK = Path("/var/tmp/why-corpus")
"""Shared by the sandbox's nodes, as a home directory is."""
LIMIT = 240.0
FOREIGN = ("SLURM", "OMP_", "MASTER_", "RANK", "WORLD_", "PYTHONPATH", "RAY")
"""Variables of this shell that a case must not see."""


def header(script: Path, key: str) -> str:
    found = re.search(rf"^# {key}: *(.*)$", script.read_text(), re.M)
    return found[1].strip() if found else ""


def expected(script: Path) -> dict[str, Any]:
    kind, *rest = header(script, "expect").split()
    said = dict(word.split("=") for word in rest)
    return {"kind": kind, "rank": int(said["rank"]) if "rank" in said else None, "host": said.get("host")}


def part(name: str) -> Path:
    """Where the log of a case lies: every third, by its name alone, is kept aside."""
    aside = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 3 == 0
    return DATA / ("why-real-aside" if aside else "why-real")


def tidy(text: str, work: Path) -> str:
    """The log as its user had it: in /scratch/ada/run, with their own environment, on a usual node."""
    prefix = Path(sys.prefix)
    places = {work: "/scratch/ada/run", prefix: "/home/ada/venv", prefix.resolve(): "/home/ada/venv"}
    places |= {ROOT: "/home/ada/raylaunch", Path(sys.base_prefix): "/opt/python"}
    for old in sorted(places, key=lambda path: len(str(path)), reverse=True):
        text = text.replace(str(old), places[old])
    return re.sub(r"/var/tmp/raylaunch-sandbox-why-corpus/spool/node\d+", "/var/spool/slurmd", text)


def cause(script: Path, extra: dict[str, str]) -> None:
    """Run one case, and keep what it printed."""
    name, how = script.stem, header(script, "how").split()
    work = WORK / name
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(HERE / "programs", work, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(script, work / "job.sh")
    log = work / ".log"
    env = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)} | extra
    env |= {"PATH": f"{sys.prefix}/bin{os.pathsep}{env['PATH']}", "HOME": str(work), "CHECKOUT": str(ROOT)}
    batch = how[0] == "sbatch"
    argv = ["sbatch", "--wait", "-o", str(log), *how[1:], "job.sh"] if batch else ["bash", "job.sh"]
    with (work / ".sbatch" if batch else log).open("wb") as said:
        process = subprocess.Popen(
            argv, cwd=work, env=env, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = -1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_bytes().decode(errors="surrogateescape") if log.exists() else ""
    keep(name, tidy(text, work), expected(script))
    print(f"{name}: ended with {code}, {len(text)} bytes, expect {header(script, 'expect')}", flush=True)
    shutil.rmtree(work, ignore_errors=True)


def keep(name: str, text: str, verdict: dict[str, Any]) -> None:
    folder = part(name)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.log").write_bytes(text.encode(errors="surrogateescape"))
    index = folder / "expected.json"
    table = json.loads(index.read_text()) if index.exists() else {}
    table[name] = verdict
    rows = (f"  {json.dumps(one)}: {json.dumps(table[one])}" for one in sorted(table))
    index.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases (all of the sort)")
    parser.add_argument("--slurm", action="store_true", help="those that need Slurm (root)")
    options = parser.parse_args()
    scripts = [path for path in sorted(CASES.glob("*.sh")) if (header(path, "how") != "shell") == options.slurm]
    chosen = [path for path in scripts if path.stem in options.names or not options.names]
    if not options.slurm:
        for script in chosen:
            cause(script, {})
        return
    from raylaunch.tools.sandbox import Sandbox

    made = Sandbox.up("why-corpus", nodes=3, cpus=4)
    try:
        with Path(made.env()["SLURM_CONF"]).open("a") as conf:  # as most sites have it
            conf.write("EnforcePartLimits=ALL\nJobAcctGatherParams=OverMemoryKill\n")
        subprocess.run(["scontrol", "reconfigure"], env=os.environ | made.env(), check=True)
        for script in chosen:
            cause(script, made.env() | {"SANDBOX": "why-corpus"})
    finally:
        made.down()


if __name__ == "__main__":
    main()
