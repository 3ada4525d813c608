"""Which endings of an attempt are the machines' fault and which the code's, from Ray's exceptions."""

from __future__ import annotations

import re

from ray.exceptions import RayActorError

from raylaunch.training.policy import AttemptOutcome

# What a survivor says when somebody else died: never the run's own fault.
_COMMUNICATION = re.compile(
    r"(Connection (closed|reset|refused)|closed by peer|Broken pipe|\bgloo\b|\bNCCL\b|TCPStore|Socket Timeout|"
    r"DistBackendError|DistNetworkError|ECONNRESET)",
    re.IGNORECASE,
)
# Broken hardware is no error of the code, however much it looks like one.
_HARDWARE = re.compile(r"(\bECC\b|unspecified launch failure|busy or unavailable|\bXid\b|CUDA error: hardware)")
# So is storage that a node cannot reach, in strerror's words: at the next attempt, or on another node, it may be there.
# Not what a person has to mend (full, a quota, permissions).
_STORAGE = re.compile(
    r"(Input/output error|Stale file handle|Transport endpoint is not connected|Remote I/O error|Host is down|"
    r"Cannot send after transport endpoint shutdown|Required key not available)"
)
# Of torch's build: no node will have it at the next attempt.
_LACKING = re.compile(r"doesn't have \w+ built in|not compiled with", re.IGNORECASE)


def classify(error: Exception) -> AttemptOutcome:
    """Whether an attempt ended by a fault of the machines or by an error of the code.

    A lost actor or node anywhere makes it a fault: what the others then say is only the cascade.
    Otherwise the first error (lowest rank) that is not about a connection is the cause.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return _of_controller(error)
    for rank, failure in sorted(failures.items()):
        inner = getattr(failure, "health_check_failure", failure)
        if isinstance(inner, RayActorError):
            text = f"lost rank {rank}: {_last_line(inner)}"
            return AttemptOutcome("fault", fingerprint=f"lost rank {rank}", text=text, rank=rank, cause="worker_lost")
    for rank, failure in sorted(failures.items()):
        text = f"rank {rank}: {_last_line(failure)}"
        if type(failure).__name__ == "Fenced":  # a newer driver exists: ours finds out before its next attempt
            return AttemptOutcome("fault", fingerprint="fenced", text=text, rank=rank, cause="fenced")
        if _HARDWARE.search(str(failure)):
            return AttemptOutcome(
                "fault", fingerprint=f"hardware of rank {rank}", text=text, rank=rank, cause="hardware"
            )
        if _STORAGE.search(str(failure)):
            return AttemptOutcome(
                "fault", fingerprint="the storage cannot be reached", text=text, rank=rank, cause="storage"
            )
        if not _COMMUNICATION.search(str(failure)):
            line = f"{type(failure).__name__}: {_last_line(failure)}"
            print_ = re.sub(r"0x[0-9a-f]+|\d+", "#", line)
            return AttemptOutcome("error", fingerprint=print_, text=f"rank {rank}: {line}", rank=rank, cause="error")
    rank, failure = min(failures.items())
    text = f"rank {rank}: {_last_line(failure)}"
    return AttemptOutcome("fault", fingerprint="communication", text=text, rank=rank, cause="communication")


def _of_controller(error: Exception) -> AttemptOutcome:
    """What no worker's code raised: Ray's own trouble, but for what torch lacks on every node alike."""
    inner = getattr(error, "controller_failure", error)
    inner = getattr(inner, "cause", None) or inner  # a RayTaskError's
    text = f"{type(inner).__name__}: {_last_line(inner)}"
    if _LACKING.search(str(inner)):
        return AttemptOutcome("error", fingerprint=text, text=text, cause="error")
    return AttemptOutcome("fault", fingerprint=type(inner).__name__, text=text, cause="ray")


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else type(error).__name__
