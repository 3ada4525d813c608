"""The checks of `raylaunch doctor` on the login node: Slurm, this user, the state directory, this machine. Checks run
in parallel, each with a time limit; a check without a result is a finding, not an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError, SlurmError, SlurmUnavailable
from raylaunch.scheduler.slurm import batch_script
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.scheduler.slurm.site import parse_estimate
from raylaunch.text import user
from raylaunch.tools.doctor import gpu_status, machine_checks, machine_facts, slurm_checks, storage_check
from raylaunch.tools.doctor.finding import Finding, ok, problem, unknown

SMI_LIMIT = 10.0


def run(config: Config, state_dir: Path, slurm: Slurm | None) -> list[Finding]:
    """All checks that need no job. `slurm`: None if Slurm is not available."""
    shared = slurm is not None
    # As long as a cluster's own directory would be: the temp directory's name follows from it.
    key = str(state_dir / "clusters" / config.cluster.name)
    with ThreadPoolExecutor(8) as pool:
        room = pool.submit(storage_check.check, state_dir)
        driver = pool.submit(gpu_status.ask, SMI_LIMIT)
        here = machine_facts.gather(config.cluster.temp_dir, key, os.environ, None if shared else "1")
        told = _slurm(config, state_dir, slurm, pool) if slurm is not None else []
    wants_gpus = batch_script.gpus_per_node(config.slurm) > 0
    return [
        *told,
        *storage_check.judge(room.result(), shared),
        *machine_checks.judge(here),
        *machine_checks.network(here, None if shared else config.cluster.interface),
        *machine_checks.software(here, driver.result(), wants_gpus, shared),
    ]


def _slurm(config: Config, state_dir: Path, slurm: Slurm, pool: Executor) -> list[Finding]:
    """Findings about Slurm. If the first query gets no response, the others are skipped."""
    try:
        found = list(slurm_checks.settings(slurm.settings(), machine_facts.limit("nofile")[0]))
    except SlurmUnavailable as error:
        return [problem("slurm.version", " ".join(error.message.split()), error.hint)]
    except SlurmError as error:
        found = [unknown("slurm.version", " ".join(error.message.split()), error.hint)]
    questions = _questions(config, state_dir, slurm)
    asked = [pool.submit(_told, check, question) for check, question in questions.items()]
    return found + [finding for one in asked for finding in one.result()]


def _told(check: str, question: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a query, or why it failed."""
    try:
        return list(question())
    except RaylaunchError as error:
        return [unknown(check, " ".join(error.message.split()), error.hint)]


def _questions(config: Config, state_dir: Path, slurm: Slurm) -> dict[str, Callable[[], Iterable[Finding]]]:
    """Check → its query."""

    def accounts() -> Iterator[Finding]:
        rows, shares = slurm.associations(user()), {}
        if rows:
            try:
                shares = slurm.shares()
            except SlurmError:  # a courtesy
                shares = {}
        return slurm_checks.accounts(rows, shares, config.slurm)

    def submit() -> Iterator[Finding]:
        script = batch_script.render(config.slurm, config.cluster.name, state_dir, "CANARY")
        try:
            words = slurm.check(script)
        except SlurmUnavailable:
            raise
        except SlurmError as error:
            yield problem("user.submit", " ".join(error.message.split()), error.hint)
        else:
            yield slurm_checks.estimate(config.slurm.nodes, *parse_estimate(words), datetime.now().astimezone())

    def containers() -> Iterator[Finding]:
        if slurm.has_containers():
            yield ok("slurm.containers", "srun supports --container-image (pyxis)")

    return {
        "queue.partition": lambda: slurm_checks.partitions(slurm.partitions(), config.slurm.partition),
        "user.accounts": accounts,
        "user.submit": submit,
        "slurm.containers": containers,
    }
