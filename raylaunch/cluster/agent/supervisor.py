"""The parent of a node's agent: starts it, starts it again, and ends what it leaves behind.

An agent that is killed, or that finds itself fenced, comes back as a plain member of the cluster by
being a new process; so there is nothing to undo in the old one. The keeper is forked from before any
thread or event loop, knows nothing of Ray or Slurm, and hands on the signals that it gets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType

from raylaunch.cluster.agent import entry
from raylaunch.cluster.agent.agent import AGAIN
from raylaunch.host import processes

LONG_LIFE = 300.0
"""Seconds after which an agent's end is not counted with those before it."""
MAX_TRIES = 8
"""Ends by a signal, one soon after the other, until this node counts as broken."""
MAX_PAUSE = 30.0
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Keeper:
    """One node's agent, life after life."""

    def __init__(self) -> None:
        self._child = 0
        self._told_to_end = False

    def keep(self) -> int:
        """Run agents until one ends for good; its exit code."""
        for number in _HANDED_ON:
            signal.signal(number, self._hand_on)
        tries = 0
        while True:
            began = time.monotonic()
            status = self._one_life()
            left = processes.end_tree(os.getpid(), keep_root=True)
            if self._told_to_end or (status >= 0 and status != AGAIN) or left:
                return status if status >= 0 else 128 - status
            tries = 1 if time.monotonic() - began > LONG_LIFE else tries + 1
            if tries > MAX_TRIES:
                print(f"raylaunch: the agent ended {tries} times in a row ({status})", flush=True)
                return 1
            pause = 0.0 if status == AGAIN and tries == 1 else min(MAX_PAUSE, 0.25 * 2 ** (tries - 1))
            print(f"raylaunch: the agent ended ({status}); another one starts in {pause:g} s", flush=True)
            until = time.monotonic() + pause
            while time.monotonic() < until and not self._told_to_end:
                time.sleep(0.05)

    def _one_life(self) -> int:
        """Fork an agent and wait for its end; the exit code, negative for a signal."""
        # A signal during the fork would find no child to hand it on to, and in the child a keeper's handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDED_ON)
        if self._told_to_end:  # while there was no agent to hear it
            return -signal.SIGTERM
        self._child = os.fork()
        if self._child == 0:
            for number in _HANDED_ON:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)
            code = 1
            try:
                processes.die_with_parent()
                code = entry.main()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # the keeper's own way out is not the agent's
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)
        while True:
            pid, status = os.wait()  # orphans of a dead agent come to us, too
            if pid == self._child:
                self._child = 0
                return os.waitstatus_to_exitcode(status)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._told_to_end = self._told_to_end or number != signal.SIGUSR1
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, number)


def main() -> int:
    """Entry point of `python -m raylaunch.cluster.agent.supervisor`."""
    processes.become_subreaper()
    os.umask(0o077)
    return Keeper().keep()


if __name__ == "__main__":
    sys.exit(main())
