"""Whether each row of the fault matrix fails when its mechanism is switched off.

    python tests/chaos/without.py [--jobs N] [WORD…]

Each switch is one small edit of a copy of this checkout, with which the row's test must fail; `WORD`s choose
switches by name or test. It takes a minute or two each, as root. The first line of the assertion is shown: it
should be about the mechanism. Exit code 1 when a test passed all the same.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = "60"
"""Seconds that the tests wait for what will not happen."""


@dataclass(frozen=True)
class Switch:
    """`old` in `file` becomes `new`, and each of `tests` fails."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


SWITCHES = (
    Switch(
        "new attempts", "raylaunch/training/policy.py",
        "    if facts.stop_reason is not None:\n",
        '    if last is not None and last.kind == "fault":\n        return Finish("failed", "off")\n'
        "    if facts.stop_reason is not None:\n",
        (
            "processes::test_a_worker_is_killed", "training_loop::test_a_worker_exits",
            "training_loop::test_a_worker_is_killed_by_its_memory_limit", "nodes::test_two_nodes_at_once",
            "nodes::test_a_second_node_dies_during_the_recovery_from_the_first",
            "injector::test_workers_and_nodes_die_and_the_ledger_says",
        ),
    ),
    Switch(
        "restarts of Ray", "raylaunch/cluster/agent/ray_keeper.py", '            self._agent.report("restarting", words)\n            await',
        '            raise BringUpError("off")\n            await', ("processes::test_the_raylet_is_killed",),
    ),
    Switch(
        "keeper", "raylaunch/cluster/agent/supervisor.py", "if self._told_to_end or (status >= 0", "if True or (status >= 0",
        ("processes::test_an_agent_is_killed",),
    ),
    Switch("drivers again", "raylaunch/cluster/head/run_queue.py", "TRIES = 3", "TRIES = 1", ("processes::test_the_driver_is_killed",)),
    Switch(
        "dashboards again", "raylaunch/cluster/agent/ray_start.py", "if any(kind == DASHBOARD for", "if False and any(kind == DASHBOARD for",
        ("processes::test_the_dashboard_is_killed",),
    ),
    Switch("steps again", "sbatch/cluster.sbatch", "-le 100 ]", "-le 0 ]", ("processes::test_slurm_kills_the_step",)),
    Switch(
        "election", "raylaunch/cluster/membership/election.py", "    if facts.silent > PATIENCE:\n", "    return Wait('off')\n    if False:\n",
        ("processes::test_the_gcs_is_killed", "processes::test_the_head_s_agent_is_killed", "nodes::test_the_head_s_node_dies"),
    ),
    Switch(
        "joiners", "raylaunch/cluster/node_loop/policy.py", "if missing > 0 and (elastic.replace", "if False and (elastic.replace",
        ("nodes::test_a_node_dies_and_is_replaced",),
    ),
    Switch(
        "growth", "raylaunch/training/policy.py", "steady = _may_join(view, elastic.scale_up_delay)", "steady: frozenset[str] = frozenset()",
        ("nodes::test_a_node_dies_and_is_replaced", "nodes::test_a_scaled_cluster_grows_and_shrinks"),
    ),
    Switch(
        "the minimum", "raylaunch/training/policy.py", "if nodes < minimum:", "if nodes < 1:",
        ("nodes::test_below_the_minimum_the_run_holds",),
    ),
    Switch(
        "other ports", "raylaunch/cluster/agent/ray_keeper.py", "if not same_ports:", "if False:", ("processes::test_the_raylet_is_killed",),
    ),
    Switch(
        "silence", "raylaunch/cluster/membership/control_channel.py", "await _receive(reader, PING_LIMIT, FromAgent)", "await _receive(reader, 3e3, FromAgent)",
        ("nodes::test_a_node_falls_silent_and_comes_back[freeze]", "nodes::test_a_node_falls_silent_and_comes_back[cut]"),
    ),
    Switch(
        "fence", "raylaunch/checkpoint/store.py", "    me = run_incarnation, attempt\n    fences =", "    return\n    fences =",
        (
            "nodes::test_a_node_falls_silent_and_comes_back[freeze]",
            "nodes::test_a_node_falls_silent_and_comes_back[cut]",
            "nodes::test_the_head_falls_silent_and_comes_back[freeze]",
            "nodes::test_the_head_falls_silent_and_comes_back[cut]",
        ),
    ),
    Switch(
        "resignation", "raylaunch/cluster/head/context.py", "return records.is_fenced(self.directory", "return False and (self.directory",
        (
            "nodes::test_the_head_falls_silent_and_comes_back[freeze]",
            "nodes::test_the_head_falls_silent_and_comes_back[cut]",
        ),
    ),
    Switch(
        "drains (Slurm)", "raylaunch/cluster/node_loop/policy.py", "for node in sorted(count.to_leave,", "for node in sorted(count.to_leave[:0],",
        ("nodes::test_a_drained_node_is_left_with_no_step_lost",),
    ),
    Switch(
        "drains (Ray)", "raylaunch/training/attempt_monitor.py", "self._draining = now, self.ray.draining()", "self._draining = now, frozenset()",
        ("nodes::test_ray_drains_a_node",),
    ),
    Switch(
        "resignation (drained)", "raylaunch/cluster/head/member_table.py", "if node == self._context.head.node:\n            self._context.resign",
        "if False:\n            self._context.resign", ("nodes::test_the_head_s_node_is_drained",),
    ),
    Switch(
        "Slurm's silence", "raylaunch/cluster/node_loop/node_loop.py", "            turn.pause = self._silent\n",
        '            turn.give_up = "Slurm is gone"\n', ("nodes::test_slurm_s_own_daemons_die",),
    ),
    Switch(
        "guests", "raylaunch/cluster/node_loop/policy.py", "elif missing <= 0 and taking > 0", "elif False and taking > 0",
        ("guests::test_idle_nodes_of_another_partition_are_taken",),
    ),
    Switch(
        "strikes", "raylaunch/cluster/node_loop/policy.py", "if count >= elastic.max_strikes)", "if count < 0)",
        ("joining::test_a_node_that_struck_out",),
    ),
    Switch(
        "watchers", "raylaunch/cluster/node_loop/node_loop.py", 'if not self._watcher:\n            return ""', 'if True:\n            return "off"',
        ("joining::test_where_nodes_may_not_submit_jobs",),
    ),
    Switch(
        "guests that lead", "raylaunch/cluster/head/allocation_policy.py", "if not facts.in_base and facts.others:  # the run", "if False:  # the run",
        ("guests::test_a_guest_that_leads_is_preempted",),
    ),
    Switch(
        "joiners without a base", "raylaunch/cluster/head/allocation_policy.py", "    if facts.others:\n        return Resign", "    if False:\n        return Resign",
        ("joining::test_the_head_is_away_for_longer",),
    ),
    Switch(
        "a batch host that comes back", "raylaunch/scheduler/slurm/allocation.py", 'return self.reason if self.reason in _REASONS else ""',
        'return ""', ("allocation::test_the_batch_host_is_away_for_longer",),
    ),
    Switch(
        "notice", "raylaunch/cluster/head/ending.py", "self._context.spawn(self._save_later(why, limit, after))", "pass",
        (
            "allocation::test_a_chain_of_jobs_finishes_the_run", "allocation::test_preempted[low-True]",
            "allocation::test_preempted[lowc-True]",
        ),
    ),
    Switch(
        "the queue over lives", "raylaunch/cluster/head/context.py", "memory.queue.insert(0, memory.running)", "pass",
        ("allocation::test_preempted[low-False]",),
    ),
    Switch(
        "successors", "raylaunch/cluster/head/allocation_policy.py", " and (self.taken in _COMES_BACK if says is None else says)", "",
        (
            "allocation::test_preempted[lowc-False]",
            "allocation::test_the_batch_host_boots_before_slurm_found_it_dead[False]",
        ),
    ),
    Switch(
        "a batch host that is new", "raylaunch/scheduler/slurm/allocation.py", " and self.signal == _NO_SCRIPT", " and False",
        ("allocation::test_the_batch_host_boots_before_slurm_found_it_dead",),
    ),
    Switch(
        "one allocation", "raylaunch/scheduler/slurm/allocation.py", "if _IS_REQUEUED in str(error).lower() or _waits(slurm, job):", "if False:",
        ("allocation::test_a_job_that_waits_again_already",),
    ),
    Switch(
        "the limit of requeues", "raylaunch/cluster/head/allocation_policy.py", " and self.resumes < self.max_requeues", "",
        ("allocation::test_requeues_are_capped",),
    ),
    Switch(
        "why it ended", "raylaunch/cluster/head/ending.py",
        "cause=word.cause, cancelled=word.cancelled", 'cause="preemption"',
        ("allocation::test_a_cancelled_job_stays_cancelled",),
    ),
    Switch("watchdog", "raylaunch/training/hang_detector.py", "if idle <= most:", "if True:", ("training_loop::test_a_rank_hangs",)),
    Switch(
        "verdict", "raylaunch/training/policy.py", "and own and facts.same_error >= elastic.max_identical_errors", "and False",
        ("training_loop::test_the_same_error_twice_ends_the_run",),
    ),
    Switch(
        "numbers", "trainers/nonfinite.py", "if math.isfinite(loss) and math.isfinite(norm):", "if True:",
        (
            "training_loop::test_a_loss_that_is_no_number_ends_the_run",
            "training_loop::test_a_loss_that_is_no_number_is_left_out[skip]",
            "training_loop::test_a_loss_that_is_no_number_is_left_out[rollback]",
        ),
    ),
    Switch(
        "saves that fail", "raylaunch/checkpoint/saver.py", "CheckpointFailed(step, cause.message))\n        return cause",
        "CheckpointFailed(step, cause.message))\n        raise cause", ("training_loop::test_storage_that_takes_nothing",),
    ),
    Switch(
        "patience with storage", "raylaunch/training/hang_detector.py", 'LONG_PHASES = {"load", "validate", "save"}',
        "LONG_PHASES: set[str] = set()", ("training_loop::test_storage_that_stalls",),
    ),
    Switch(
        "digests", "raylaunch/checkpoint/checksums.py", "if found[1] != sha256:", "if False:",
        ("training_loop::test_a_damaged_checkpoint_is_done_without[flipped]",),
    ),
    Switch(
        "the one before", "raylaunch/checkpoint/saver.py", "        _refuse(session, one, refused)\n    unreadable",
        '        raise StateError("off", "off")\n    unreadable',
        ("training_loop::test_a_damaged_checkpoint_is_done_without[torn]",),
    ),
)  # fmt: skip


def environment(place: Path, switch: Switch) -> Path:
    """A Python of its own that sees the edited copy in place of this checkout; its path."""
    tree = place / "tree"
    left_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=left_out)  # raylaunch/trainers is a link
    file = tree / switch.file
    text = file.read_text()
    assert text.count(switch.old) == 1, (
        f"{switch.name}: {switch.file} has {text.count(switch.old)} times {switch.old!r}"
    )
    file.write_text(text.replace(switch.old, switch.new))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = place / "lib" / version / "site-packages"
    own.mkdir(parents=True)
    (own / "ours.pth").write_text(f"{tree}\n{sysconfig.get_path('purelib')}\n")
    (place / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    (place / "bin").mkdir()
    (place / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    for name in ("raylaunch", "ray"):
        text = (Path(sys.executable).parent / name).read_text()
        (place / "bin" / name).write_text(re.sub(r"^#!.*", f"#!{place}/bin/python", text, count=1))
        (place / "bin" / name).chmod(0o755)
    return place / "bin" / "python"


def fails(switch: Switch) -> bool:
    """Run the switch's tests; whether each failed."""
    caught = True
    with tempfile.TemporaryDirectory(prefix="raylaunch-without-", dir="/var/tmp") as place:
        python = environment(Path(place), switch)
        for test in switch.tests:
            module, _, name = test.partition("::")
            began = time.monotonic()
            done = subprocess.run(
                [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/chaos/test_{module}.py", "-k", chosen(name)],
                cwd=Path(place) / "tree", capture_output=True, text=True, check=False,
                env={**os.environ, "RAYLAUNCH_TEST_PATIENCE": PATIENCE},
            )  # fmt: skip
            failed = done.returncode == 1 and re.search(r"\b1 (failed|error)\b", done.stdout) is not None
            caught &= failed
            said = [line for line in done.stdout.splitlines() if line.startswith("E  ")] or done.stdout.splitlines()[
                -3:
            ]
            word = "fails" if failed else "DOES NOT FAIL"
            print(
                f"{word:6} without {switch.name}: {test} ({time.monotonic() - began:.0f} s)\n       {said[0][:200]}",
                flush=True,
            )
    return caught


def chosen(name: str) -> str:
    """For pytest's -k, which knows no brackets."""
    return " and ".join(re.split(r"[\[\]-]+", name.rstrip("]")))


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("words", nargs="*")
    asked = options.parse_args()
    some = [s for s in SWITCHES if not asked.words or any(word in str(s) for word in asked.words)]
    with ThreadPoolExecutor(asked.jobs) as pool:
        return 0 if all(list(pool.map(fails, some))) else 1


if __name__ == "__main__":
    sys.exit(main())
