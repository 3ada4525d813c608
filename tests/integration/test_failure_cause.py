"""Which endings of an attempt are a machine's fault and which the code's: on Ray's real exceptions."""

from __future__ import annotations

import errno
import os

import pytest
from ray.exceptions import ActorDiedError, RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

from raylaunch.checkpoint.store import Fenced
from raylaunch.errors import StateError
from raylaunch.training.failure_cause import classify

GLOO = RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.3]:4711. This is typically caused by a crash.")
MINE = ValueError("shape (3, 4) does not fit")


def group(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("…", {int(rank.removeprefix("r")): error for rank, error in failures.items()})


@pytest.mark.parametrize(
    ("error", "kind", "rank"),
    [
        (group(r0=GLOO, r2=ActorDiedError()), "fault", 2),
        (group(r0=MINE, r1=RayActorError()), "fault", 1),
        (group(r1=WorkerHealthCheckFailedError("no answer", RayActorError())), "fault", 1),
        (group(r0=GLOO, r1=GLOO), "fault", 0),
        (group(r0=GLOO, r3=MINE), "error", 3),
        (group(r1=MINE, r2=MINE), "error", 1),
        (group(r1=MINE, r2=Fenced("a newer attempt may commit")), "error", 1),
        (group(r1=GLOO, r2=Fenced("a newer attempt may commit")), "fault", 2),
        (group(r1=RuntimeError("CUDA error: uncorrectable ECC error encountered")), "fault", 1),
        (group(r3=OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/shared/data.arrow")), "fault", 3),
        (group(r0=GLOO, r1=StateError("cannot read /shared/x: Input/output error")), "fault", 1),
        (group(r1=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), "error", 1),  # a person has to make room
        (WorkerGroupStartupTimeoutError(4), "fault", None),
        (ControllerError(RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.3]:4711")), "fault", None),
        (ControllerError(RuntimeError("Distributed package doesn't have NCCL built in")), "error", None),
    ],
)
def test_the_cause_is_not_the_cascade(error: Exception, kind: str, rank: int | None) -> None:
    ending = classify(error)
    assert (ending.kind, ending.rank) == (kind, rank)
    assert ending.text and ending.fingerprint


def test_the_same_error_has_the_same_fingerprint_whatever_its_numbers() -> None:
    one, two = classify(group(r0=MINE)), classify(group(r2=ValueError("shape (5, 6) does not fit")))
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != classify(group(r0=KeyError("x"))).fingerprint
