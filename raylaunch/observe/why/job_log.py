"""The outcome of a Slurm job: its state in Slurm, and its output if it can be read here."""

from __future__ import annotations

from pathlib import Path

from raylaunch.errors import RaylaunchError
from raylaunch.observe.why import log_lines
from raylaunch.observe.why.log_lines import Line
from raylaunch.observe.why.verdict import NOTHING, Evidence, Verdict, judge, on
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.scheduler.slurm.rows import FinishedRow


def explain(job: str, slurm: Slurm) -> Verdict:
    """The verdict; RaylaunchError if the job is unknown."""
    here = slurm.available()
    now = slurm.jobs([job]).get(job) if here else None
    if now is not None and not now.terminal:
        return on(
            NOTHING, cause=f"job {job} is {now.state.lower()} and has not ended", confidence=0.9,
            action=f"See `scontrol show job {job}` and its output so far.",
        )  # fmt: skip
    row = ((slurm.finished([job]) if here else None) or {}).get(job)
    detail = slurm.detail(job) if here else None
    output = (detail.output if detail is not None else None) or Path(f"slurm-{job}.out")
    lines = list(log_lines.lines(output)) if output.is_file() else []
    if row is None and now is None and not lines:
        raise RaylaunchError(
            f"job {job} is unknown: no accounting record, and no file {output}",
            "Pass the job's output file: `scontrol show job JOB` prints its path (StdOut) shortly after its end, too.",
        )
    ended = row or now
    if ended is None:
        return judge(lines)
    code = f" ExitCode={row.exit_code}:{row.signal}" if row is not None else ""
    said = Line("sacct" if row is not None else "squeue", 1, f"State={ended.state}{code}",
                host=ended.nodes[0] if len(ended.nodes) == 1 else None)  # fmt: skip
    found = judge([*lines, said])
    return found if found.kind != "unknown" else _by_its_state(job, row, said, bool(lines))


def _by_its_state(job: str, row: FinishedRow | None, said: Line, has_output: bool) -> Verdict:
    """If only the end state is known."""
    state = said.text.removeprefix("State=").split()[0]
    code = f"exit code {row.exit_code}" + (f", signal {row.signal}" if row.signal else "") if row is not None else state
    how = {"COMPLETED": "completed successfully", "CANCELLED": "was cancelled"}.get(state, f"ended with {code}")
    action = f"`sacct -j {job} -o JobID,State,ExitCode,Elapsed` lists its steps."
    if state == "COMPLETED":
        action = "No action is needed."
    elif state != "CANCELLED" and not has_output:
        action = f"Pass its output file: `raylaunch why FILE` (by default slurm-{job}.out, where it was submitted)."
    evidence = (Evidence(said.file, said.number, said.text),)
    return on(NOTHING, cause=f"job {job} {how}", host=said.host, confidence=0.6, evidence=evidence, action=action)
