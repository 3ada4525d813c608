"""An sbatch script, or a torchrun or srun command, → the config that does the same, and what could not be carried over.

Read only: no variable of this machine is looked at, nothing is run. What prepares a node (modules, environments,
exports) goes into `slurm.setup` as it stands and in its order; what raylaunch does itself is left out without a word
(rendezvous addresses, ranks); all else that has no place in the config, or that is not certain, is a note. A secret
is neither carried over nor shown: the config refers to it.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from raylaunch.config.convert import flags, shell
from raylaunch.config.convert.launch import ASSIGNMENT, Launch, find_launch, words_of

_KEYS = {
    "job-name": "job_name", "ntasks-per-node": "ntasks_per_node", "gpus-per-node": "gpus_per_node", "gres": "gres",
    "cpus-per-task": "cpus_per_task", "mem": "mem", "time": "time", "account": "account", "partition": "partition",
    "qos": "qos", "constraint": "constraint", "reservation": "reservation", "nodelist": "nodelist",
    "exclude": "exclude", "mail-type": "mail_type", "mail-user": "mail_user", "comment": "comment",
}  # fmt: skip
"""sbatch's options with a key of their own."""


_NUMBERS = {"ntasks_per_node", "cpus_per_task"}
_OURS = {"requeue", "no-kill", "open-mode", "kill-on-bad-exit", "label", "unbuffered", "parsable"}
"""What raylaunch sets itself."""
_LOGS = "logs lie in the run's directory: `raylaunch logs RUN`"
_NOT_OURS = {
    "output": _LOGS, "error": _LOGS,
    "array": "one run is one job: submit one config per index with `raylaunch submit`",
    "dependency": "give it behind `raylaunch up --` or `raylaunch submit --`",
    "no-requeue": "set elastic.max_requeues: 0 to end with the allocation",
}  # fmt: skip


_SIGNALS = {"TERM", "INT", "USR1", "USR2"}
_RENDEZVOUS = re.compile(
    r"(MASTER_(ADDR|PORT)|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|RDZV_\w+|HEAD_NODE\w*|"
    r"head_node\w*|nodes(_array)?|NNODES|NUM_NODES|GPUS_PER_NODE|NPROC_PER_NODE|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES)"
)
"""Variables that scripts set for torchrun, and that raylaunch or the agents set."""


_RDZV = {"rdzv-id", "rdzv-backend", "rdzv-endpoint", "rdzv-conf", "master-addr", "master-port", "node-rank", "standalone",
         "local-addr", "local-ranks-filter", "start-method", "role", "monitor-interval", "max-restarts", "use-env"}  # fmt: skip


_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSW)", re.IGNORECASE)
_PREPARES = {"module", "ml", "source", ".", "conda", "mamba", "micromamba", "eval", "ulimit", "umask", "unset", "spack"}
_SILENT = {
    "set",
    "echo",
    "date",
    "hostname",
    "nvidia-smi",
    "pwd",
    "ls",
    "true",
    "wait",
    "sleep",
    "printf",
    "trap",
    "exit",
}


_NAME = re.compile(r"\$(\{)?([A-Za-z_]\w*)(?(1)\})")
_DEFAULT = re.compile(r"\$\{[A-Za-z_]\w*:?-([^}$]*)\}")


class Unreadable(ValueError):
    """No training command, or no shell script at all."""


@dataclass
class Converted:
    """The config's values, by section, and what a person has to look at."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        line = " ".join(text.split())
        line = line if len(line) <= 160 else f"{line[:157]}..."
        if line not in self.notes:
            self.notes.append(line)


def script(text: str) -> Converted:
    """A batch script. Raises Unreadable."""
    try:
        read = shell.read(text)
    except ValueError as error:
        raise Unreadable(str(error)) from error
    return _Script(Converted()).convert(read)


def command(words: list[str]) -> Converted:
    """A torchrun, srun or python command. Raises Unreadable."""
    launch = find_launch(words)
    if launch is None:
        raise Unreadable(f"no torchrun, srun or python command: {shlex.join(words)[:80]}")
    reader = _Script(Converted())
    reader.train(launch)
    return reader.settled()


class _Script:
    """One conversion: commands in, values and notes out."""

    def __init__(self, out: Converted) -> None:
        self.out = out
        self.variables: dict[str, str] = {}
        self.hidden: dict[str, str] = {}
        """Secret value → the variable that is to hold it."""
        self.computed: dict[str, str] = {}
        """Variable → the command that computes it on the node."""
        self.slurm: dict[str, Any] = {}
        self.totals: dict[str, str] = {}
        self.setup: list[str] = []
        self.env: dict[str, str] = {}
        self.trainer: dict[str, Any] = {}
        self.chdir = ""

    def convert(self, read: shell.Script) -> Converted:
        self.resources(flags.slurm(read.directives).values)
        launches = [(c, find_launch(words_of(shell.put_in(c.text, {})))) for c in read.commands]
        found = [launch for _, launch in launches if launch is not None]
        best = max(found, key=lambda launch: launch.certain, default=None)
        for each, launch in launches:
            if launch is not None and launch is best:
                launch = find_launch(words_of(shell.put_in(each.text, self.variables))) or launch
                if each.inside:
                    self.out.note("the training command is inside an if, a loop or a function: it is run once here")
                self.train(launch)
            elif launch is not None:
                self.out.note(f"not carried over: {self.shown(each.text)}")
            else:
                self.prepare(each)
        if best is None:
            raise Unreadable("the script contains no training command (torchrun, or python after srun)")
        return self.settled()

    # -- sbatch's options --------------------------------------------------------------------------

    def resources(self, given: dict[str, str], by_srun: bool = False) -> None:
        """sbatch's options, and srun's where the training is behind it: those do not win over sbatch's."""
        for name, value in given.items():
            text = f"--{name}{f'={value}' if value else ''}"
            if "$" in value or "`" in value:
                if name not in {"output", "error", "job-name"}:
                    self.out.note(f"{text}: its value is known on the node only; write it")
            elif name in _KEYS:
                key = _KEYS[name]
                self.slurm.setdefault(key, int(value) if key in _NUMBERS and value.isdigit() else value)
            elif name == "nodes":
                self.slurm.setdefault("nodes", value.replace("-", ":"))
            elif name in {"ntasks", "gpus", "gpus-per-task"}:
                self.totals.setdefault(name, value)
            elif name == "exclusive":
                self.slurm["exclusive"] = True
            elif name.startswith(("container", "no-container")):
                self.out.note(f"{text}: containers are not carried over; start the agents in yours")
            elif name == "chdir":
                self.chdir = self.chdir or value
            elif name == "signal":
                self.signal(value)
            elif name in _NOT_OURS:
                self.out.note(f"{text}: {_NOT_OURS[name]}")
            elif name in _OURS or (name, value) == ("export", "ALL"):
                continue
            elif by_srun:
                self.out.note(f"srun {text}: not converted; workers are not srun tasks")
            else:
                self.slurm.setdefault("extra", []).append(text)

    def signal(self, value: str) -> None:
        """--signal=[B:]NAME[@SECONDS]: what the script gets, and when raylaunch is told."""
        name, _, seconds = value.upper().partition("@")
        bare = name.removeprefix("B:").removeprefix("R:").removeprefix("SIG")
        if name.startswith("B:") or bare not in _SIGNALS:
            self.out.note(f"--signal={value}: set trainer.stop_signal to the signal at which the script saves")
        else:
            self.trainer["stop_signal"] = f"SIG{bare}"
        if seconds.isdigit():
            self.slurm["signal"] = f"B:USR1@{seconds}"
            self.trainer["stop_timeout"] = float(seconds)

    # -- commands ------------------------------------------------------------------------------------

    def prepare(self, each: shell.Command) -> None:
        """A command that is not the training."""
        text = shell.put_in(each.text, self.variables)
        words = words_of(text)
        head = words[0] if words else ""
        raw = each.text.removeprefix("export ").strip() if head == "export" or "=" in head else ""
        if raw and ASSIGNMENT.match(raw):
            self.assign(each, raw, exported=head == "export")
        elif head in _PREPARES or head == "export":
            if each.inside:
                return self.out.note(f"inside an if, a loop or a function, not carried over: {self.shown(each.text)}")
            self.setup.append(self.shown(text, cut=False))
        elif head == "cd":
            if not self.trainer.get("script") and len(words) > 1 and "SLURM_SUBMIT_DIR" not in words[1]:
                self.chdir = words[1]
        elif head and (head not in _SILENT or ">" in each.text):
            self.out.note(f"not carried over: {self.shown(each.text)}")
        return None

    def assign(self, each: shell.Command, raw: str, exported: bool) -> None:
        """`A=b`, `export A=b C=d`."""
        for word in words_of(shell.put_in(raw, self.variables)) if exported else [None]:
            match = ASSIGNMENT.match(word if word is not None else shell.put_in(raw, self.variables))
            if match is None:
                continue
            name, value = match[1], match[2] if word is not None else _first(match[2])
            if _RENDEZVOUS.fullmatch(name):
                continue
            if each.inside:
                self.variables.pop(name, None)
                self.out.note(f"{name} is set inside an if, a loop or a function: write its value where it is used")
            elif _SECRET.search(name):
                self.variables.pop(name, None)
                if value and "$" not in value:
                    self.hidden[value] = name
                    self.out.note(
                        f"{name}: a secret in the script; set it in your environment, the config refers to it"
                    )
                if exported:
                    self.env[name] = f"${{{name}}}"
            elif "$" in value or "`" in value:
                self.variables.pop(name, None)
                line = self.shown(f"{name}={_quoted(value)}", cut=False)
                if exported:
                    self.setup.append(f"export {line}")
                else:
                    self.computed[name] = line
            else:
                self.variables[name] = value
                if exported:
                    self.env[name] = value

    def train(self, launch: Launch) -> None:
        """The training command."""
        for text in launch.before:
            self.prepare(shell.Command(text))
        for word in launch.environment:
            self.assign(shell.Command(word), shlex.quote(word) if " " in word else word, exported=True)
        for text in launch.notes:
            self.out.note(text)
        self.resources(launch.given, by_srun=True)
        if launch.torchrun is not None:
            self.workers(launch.torchrun)
        words = launch.words
        if words[0] == "-m":
            self.out.note(
                f"python -m {words[1]}: name a script; runpy.run_module({words[1]!r}, run_name='__main__') is one line"
            )
            words = [f"{words[1].replace('.', '/')}.py", *words[2:]]
        self.trainer["script"] = self.argument(words[0]) or words[0]
        args = [kept for word in words[1:] if (kept := self.argument(word)) is not None]
        if args:
            self.trainer["args"] = args

    def workers(self, given: dict[str, str]) -> None:
        """torchrun's sizes: its --nproc-per-node are our tasks, and share the CPUs of the task that it was."""
        nodes, count = given.get("nnodes", ""), given.get("nproc-per-node", "")
        if re.fullmatch(r"\d+(:\d+)?", nodes):
            self.slurm.setdefault("nodes", nodes)
        before = str(self.slurm.pop("ntasks_per_node", 1))
        if count.isdigit():
            self.slurm["ntasks_per_node"] = int(count)
        elif count and count not in {"gpu", "auto"}:
            self.out.note(
                f"--nproc-per-node={count}: a worker a GPU, else one, unless slurm.ntasks_per_node says otherwise"
            )
        gpus = re.search(r"(\d+)$", str(self.slurm.get("gpus_per_node", self.slurm.get("gres", ""))))
        each = int(count) if count.isdigit() else int(gpus[1]) if gpus else 0
        cpus = str(self.slurm.get("cpus_per_task", ""))
        if each and cpus.isdigit() and before.isdigit():
            self.slurm["cpus_per_task"] = max(1, int(cpus) * int(before) // each)
        for name in sorted(given.keys() - _RDZV - {"nnodes", "nproc-per-node", "module", "no-python"}):
            self.out.note(f"torchrun --{name}: not carried over")

    def argument(self, word: str) -> str | None:
        """A word of the training command as a config has it; None where only a shell would know it."""
        word = _DEFAULT.sub(lambda match: match[1], word)
        for value, name in self.hidden.items():
            word = word.replace(value, f"${{{name}}}")
        if word.startswith("~/"):
            word = f"${{HOME}}{word[1:]}"
        text = _NAME.sub(r"${\2}", word)
        if "$" in _NAME.sub("", text) or "`" in text:
            self.out.note(f"{word}: an argument that only the shell of the script knows; write its value")
            return None
        for name in _names(text):
            if name not in {"HOME", "USER"} and not _SECRET.search(name):
                self.out.note(f"${name} in the training command is not known here: write its value")
        return text

    def shown(self, text: str, cut: bool = True) -> str:
        """Without secrets."""
        for value, name in self.hidden.items():
            text = text.replace(value, f"${{{name}}}")
        text = re.sub(r"(\blogin\s+(?:--?\S+\s+)*)\S+", r"\1…", text) if cut else text
        return re.sub(r"(?i)(--?[\w-]*(?:key|token|password|secret)[\w-]*[= ])\S+", r"\1…", text) if cut else text

    def settled(self) -> Converted:
        """Totals become numbers per node, what setup needs is computed before it, and empty sections go."""
        slurm, nodes = self.slurm, str(self.slurm.get("nodes", "1"))
        tasks, gpus, each = (self.totals.get(name, "") for name in ("ntasks", "gpus", "gpus-per-task"))
        for name, value, key in (("ntasks", tasks, "ntasks_per_node"), ("gpus", gpus, "gpus_per_node")):
            kind, _, number = value.rpartition(":")
            if not value or key in slurm:
                continue
            if number.isdigit() and nodes.isdigit() and int(number) % int(nodes) == 0:
                count = int(number) // int(nodes)
                if key == "gpus_per_node" or count > 1:
                    slurm[key] = f"{kind}:{count}" if kind else count
            else:
                self.out.note(f"--{name}={value}: give slurm.{key}, the number per node")
        if each and "gpus_per_node" not in slurm:
            kind, _, number = each.rpartition(":")
            if number.isdigit():
                count = int(number) * int(slurm.get("ntasks_per_node", 1))
                slurm["gpus_per_node"] = f"{kind}:{count}" if kind else count
        needed = " ".join(self.setup)
        lines = [line for name, line in self.computed.items() if name in _names(needed)]
        slurm |= {key: value for key, value in (("env", self.env), ("setup", [*lines, *self.setup])) if value}
        if self.chdir and (chdir := self.argument(self.chdir)):
            self.trainer["chdir"] = chdir
        self.out.values = {key: value for key, value in (("slurm", slurm), ("trainer", self.trainer)) if value}
        return self.out


def _first(value: str) -> str:
    return (words_of(value) or [""])[0]


def _quoted(value: str) -> str:
    """For a line of shell that is to expand it."""
    return value if re.fullmatch(r"[^\s\"']*", value) else '"' + value.replace('"', '\\"') + '"'


def _names(text: str) -> list[str]:
    """The variables in it."""
    return [match[2] for match in _NAME.finditer(text)]
