"""One agent from its first check to its last: what it logs, its signals, and what it leaves when it cannot go on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal

from raylaunch.cluster.agent.agent import AGAIN, Agent
from raylaunch.cluster.agent.cluster_files import check_canary, read_token
from raylaunch.cluster.agent.identity import NodeIdentity
from raylaunch.cluster.agent.node_setup import NodeSetup
from raylaunch.cluster.agent.orphan import give_back_orphaned
from raylaunch.cluster.agent.retry import retry_storage, retry_within
from raylaunch.cluster.membership.control_channel import AlreadyHere
from raylaunch.config import loader
from raylaunch.errors import RaylaunchError
from raylaunch.host import processes
from raylaunch.host.internal_errors import described
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.scheduler.slurm.rows import ENDING, TERMINAL
from raylaunch.state import event_log, files, records, thread_deaths
from raylaunch.state.appender import LOG_ROOM, Appender, AppendingHandler
from raylaunch.state.cluster_events import CouldNotLead
from raylaunch.state.records import Head
from raylaunch.timing import LOG_PATIENCE, TERM_PATIENCE

log = logging.getLogger("raylaunch.agent")
RECORD_LIMIT = 10.0


async def supervise(here: NodeIdentity, at_end: contextlib.ExitStack) -> int:
    """One agent from its first check to its last; the exit code."""
    agent: Agent | None = None
    failure: Exception | None = None
    try:
        cluster = await check_canary(here)
        log_file = Appender(here.directory / records.LOGS / f"{here.node}.log", LOG_ROOM, is_log=True)
        log_file.start()
        at_end.callback(log_file.close, LOG_PATIENCE)
        _log_to(log_file)
        file = here.directory / records.CONFIG_FILE
        config = await retry_storage(lambda: asyncio.to_thread(loader.load_resolved, file))
        token = await retry_storage(lambda: asyncio.to_thread(read_token, here))
        agent = Agent(here, cluster, config, await asyncio.to_thread(NodeSetup.prepare, here, token, cluster, config))
        _handle_signals(agent)
        thread_deaths.record(here.directory, node=here.node)
        tasks = [asyncio.create_task(t) for t in (agent.run(), agent.until_gpus_fail(), agent.end.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        failure = next((r for r in results if isinstance(r, Exception)), None)  # a CancelledError is not one
        if isinstance(failure, AlreadyHere):  # no fault of this node's: one agent is enough
            agent.stop(str(failure))
            failure = None
        elif failure is not None and agent.again:
            await _could_not_lead(here, failure)
            failure = None
    except (RaylaunchError, OSError) as error:
        failure = error
    if failure is not None:
        if agent is not None and agent.duties is not None:
            agent.duties.exit_code = 1
        await _report(here, agent, failure)
    if agent is not None:
        await agent.close()
        if agent.orphaned and not here.local:
            await give_back_orphaned(here, agent.terminated, os.environ)
        if agent.again:
            return AGAIN
        if failure is None:
            return agent.duties.exit_code if agent.duties else 0
    return 1


async def _could_not_lead(here: NodeIdentity, failure: Exception) -> None:
    """A head that could not begin has resigned, and this node comes back as a member: no failure of the node's."""
    log.error("could not lead", exc_info=failure)
    tell = functools.partial(event_log.append, here.directory, CouldNotLead(here.node, described(failure)))
    with contextlib.suppress(RaylaunchError, OSError):
        await retry_within(tell, RECORD_LIMIT)


async def _report(here: NodeIdentity, agent: Agent | None, failure: Exception) -> None:
    """Say why this node cannot go on: to the head, in the job's output, and in the cluster directory."""
    text = (
        " ".join(". ".join(filter(None, (failure.message, failure.hint))).split())
        if isinstance(failure, RaylaunchError)
        else f"{type(failure).__name__}: {failure}"
    )
    log.error("failed error=%r", text, exc_info=None if isinstance(failure, RaylaunchError) else failure)
    if agent is not None:
        agent.stop(text)
        agent.report("failed", text)
    await asyncio.to_thread(print, f"{records.FAILED_LINE} {here.node}: {text}", flush=True)
    leads = agent is not None and agent.duties is not None
    # Without an agent, the directory may not be shared at all: only the line above tells then.
    limit = RECORD_LIMIT if agent is not None else 0.0
    record = here.directory / records.NODES / f"{here.node}.json"
    for work in (
        functools.partial(files.write_json, record, {"node": here.node, "error": text}),
        functools.partial(_end_life, here, text, leads),
    ):
        try:
            await retry_within(work, limit)
        except (RaylaunchError, OSError) as error:
            log.error("the failure could not be recorded error=%r", str(error))


def _end_life(here: NodeIdentity, text: str, leads: bool) -> None:
    """The last word on a life of the cluster that has no head to say it: its first node could not begin. Blocking."""
    if here.is_first and not leads and not _another_leads(here, Head.read(here.directory)):
        records.write_end(here.directory, here.canary, text, {}, [], exit_code=1)


def _another_leads(here: NodeIdentity, head: Head | None) -> bool:
    """Whether this life has a head: another node that was elected, or the one of another allocation that is not over.
    SlurmError, while Slurm does not say."""
    if head is None or head.canary != here.canary:
        return False
    if not here.is_over(head):
        return head.node != here.node
    other = Slurm().jobs([head.job]).get(head.job) if not here.local and head.job != here.job else None
    return other is not None and other.state not in TERMINAL | ENDING


def _handle_signals(agent: Agent) -> None:
    """SIGTERM and SIGINT end the node; SIGUSR1 is Slurm's notice that time runs out."""
    loop = asyncio.get_running_loop()

    def terminate(name: str) -> None:
        agent.terminated.set()
        if agent.duties is not None and agent.duties.terminated():
            return
        if agent.here.local or agent.link is None or agent.duties is not None:
            agent.stop(f"signal {name}")
        else:  # the grace before a preemption: the head saves first, then orders the end
            loop.call_later(TERM_PATIENCE, agent.stop, f"signal {name}")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, terminate, number.name)

    def out_of_time() -> None:
        if agent.duties is not None:
            agent.duties.notice()

    loop.add_signal_handler(signal.SIGUSR1, out_of_time)


def _log_to(out: Appender) -> None:
    """Log into a file, from a thread of its own."""
    handler = AppendingHandler(out)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def main() -> int:
    """One agent's life, in a process that its keeper has made for it."""
    processes.become_subreaper()
    with contextlib.ExitStack() as at_end:
        return asyncio.run(supervise(NodeIdentity.from_environment(os.environ), at_end))
