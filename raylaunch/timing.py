"""Time limits that depend on each other, in seconds, and what has to hold between them.

A limit that nothing else depends on stands where it is used. These stand here, so that whoever changes one sees the
others: most are derived, and RELATIONS is checked whenever this module is imported.
"""

from __future__ import annotations

from collections.abc import Mapping

# Slurm's defaults
SLURMD_TIMEOUT = 300.0
"""A node that does not answer for so long is down."""
KILL_WAIT = 30.0
"""From SIGTERM to SIGKILL."""

# Connections between agents (control_channel)
PING_EVERY = 0.5
PING_LIMIT = 6 * PING_EVERY
"""Silence after which the other side counts as gone."""
HANDSHAKE_LIMIT = 5.0
ASK_LIMIT = 1.5
"""For another agent's answer to whether it sees the head."""
ALREADY_LIMIT = PING_LIMIT + 2.0
"""To insist where another job's agent seems to have the node: one that has just died is found by then."""

# Looking for a head (seek, election)
FILES_EVERY = 0.3
SLURM_EVERY = 5.0
CONNECT_LIMIT = 2.0
VERDICT = PING_LIMIT + 1.5
"""Within which a living head would have written that it holds us for lost."""
TOGETHER = 10.0
"""Between two losses that a cut-off head may see of one cut."""
LONELY = 1.0
"""That the only other node waits for the head's word, even if the connection was closed."""
TURN = ASK_LIMIT
"""That each candidate waits for the one before it."""
PUBLISH_LIMIT = 15.0
"""That the winner of an election has to say where it is."""
PATIENCE = 600.0
"""Without a head after which a node gives up: longer than a switch reboots, and than Slurm takes to call dead nodes
down, without which a smaller half has no majority."""

# Nodes that come, and come back (agent, head, node_loop)
CANARY_PATIENCE = 10.0
"""NFS shows a new file late."""
CONNECT_PATIENCE = 20.0
COMPANY_PATIENCE = CONNECT_PATIENCE
"""That a head which cannot stay waits for somebody to take over."""
FOLLOW_LIMIT = 20.0
"""Within which the nodes come to a new head."""
BLAME_AFTER = 2.0
"""From a node's loss to its strike: by then it is known whether most are lost, or the node is back."""
REJOIN_GRACE = 5.0
"""That a lost node gets to come back by itself before it costs a joiner."""
BOOT_LIMIT = 180.0
"""After its job's start within which a node that has not been heard of still counts as coming."""

# The end of a node, a cluster, an allocation (agent, head, drivers, teardown, allocation)
TREE_LIMIT = 5.0
"""To end all processes of a node."""
LOG_PATIENCE = 2.0
"""That an agent's end waits for the last lines of its log to be written."""
TERM_LIMIT = 20.0
"""After SIGTERM in which the run may leave the head's own node."""
TERM_PATIENCE = TERM_LIMIT
"""After SIGTERM that a node waits for its head's order to end."""
ENDING_LIMIT = 2 * TREE_LIMIT
"""That the head waits for the last words of the nodes."""
TELL_LIMIT = 8.0
"""For the alerts of a run whose driver could not send them, while the cluster ends."""
ALLOCATION_ENDING = ENDING_LIMIT + TREE_LIMIT
"""To end the agents and to requeue."""
DOWN_LIMIT = ENDING_LIMIT + TELL_LIMIT + 2.0
"""That `raylaunch down` waits for a head's end, beside the time to save."""
TAKEN_LIMIT = 15.0
"""Within which a living head takes a request."""
GONE_LIMIT = 2 * KILL_WAIT
"""From a cancel to the end of the jobs."""

# Saving and telling at the end of a run (loop, trainers, head, beside, alerts)
PATIENCE_AT_STOP, PATIENCE_AT_END = 60.0, 600.0
"""For which the last save of an attempt, and of the run, is tried again when it fails."""
SAVE_LIMIT = PATIENCE_AT_STOP
"""That a run gets to save when the cluster is to end, unless the request says otherwise."""
LAST_LIMIT = 15.0
"""That the end of a run waits for the sinks of its alerts."""
RUN_TELL_LIMIT = LAST_LIMIT + 10.0
"""For the same in a process of its own, started for a run whose driver is dead."""
BESIDE_LIMIT = 2 * LAST_LIMIT
"""That a run's end waits for the processes beside its driver."""

# Signs of life and load (pulse, watchdog, load)
BEAT_EVERY = 2.0
SILENCE = 5.0
"""Without a sign of life after which a worker is called silent."""
LOAD_EVERY = 5.0
"""Between two samples of a node's load, and between two writes of the latest ones."""
GONE_AFTER = 60.0
"""Without word from a node after which it is not part of the mean load."""

RELATIONS = {
    "4 * PING_EVERY <= PING_LIMIT": "a few pings that are late are no silence",
    "PING_LIMIT + PING_EVERY <= ALREADY_LIMIT": "the head finds a silent agent before its successor there gives up",
    "PING_LIMIT + PING_EVERY + 2 * FILES_EVERY < VERDICT": "the head may find our silence a ping later than we its, and we have to read what it writes",
    "PING_LIMIT + PING_EVERY < TOGETHER": "nodes behind one cut are found so far apart",
    "2 * FILES_EVERY < LONELY": "the head's word is read before the lonely node claims",
    "ASK_LIMIT <= TURN": "a candidate has all its answers before the next one claims",
    "2 * PUBLISH_LIMIT < PATIENCE": "a winner that dies is replaced before the others give up",
    "SLURMD_TIMEOUT + SLURM_EVERY < PATIENCE": "a smaller half hears from Slurm who is down before it gives up",
    "PING_LIMIT + FILES_EVERY + CONNECT_LIMIT < FOLLOW_LIMIT": "a node finds the old head's silence, reads of the new one and connects",
    "2 * PING_EVERY <= BLAME_AFTER": "nodes that fall silent together are found a ping apart: strikes wait for the last",
    "PING_LIMIT + CONNECT_LIMIT <= REJOIN_GRACE": "a node that finds the cut only by silence has one try before it is replaced",
    "CANARY_PATIENCE + CONNECT_PATIENCE < BOOT_LIMIT": "a slow node is heard of before it is replaced",
    "2 * HANDSHAKE_LIMIT < CONNECT_PATIENCE": "a node whose first try hangs has another one",
    "CONNECT_PATIENCE <= COMPANY_PATIENCE": "the others have connected before a head that cannot stay gives up",
    "TERM_LIMIT <= TERM_PATIENCE": "the other nodes of a job stay until the run has left the head's",
    "TERM_PATIENCE + TREE_LIMIT + LOG_PATIENCE < KILL_WAIT": "a node ends by itself before Slurm kills it",
    "TREE_LIMIT < ENDING_LIMIT": "a node has ended its processes before the head gives up on its last word",
    "TELL_LIMIT <= ENDING_LIMIT": "the last alerts do not prolong the end",
    "ENDING_LIMIT + TREE_LIMIT <= ALLOCATION_ENDING": "the other nodes end, then the head's own, then the job is requeued",
    "ENDING_LIMIT + TELL_LIMIT < DOWN_LIMIT": "down waits until the head has ended everything",
    "PING_LIMIT + VERDICT + TURN < TAKEN_LIMIT": "a request may wait for the election of a head",
    "KILL_WAIT < GONE_LIMIT": "Slurm kills what does not end by itself",
    "PATIENCE_AT_STOP <= SAVE_LIMIT": "the head waits for as long as the trainer tries to save",
    "PATIENCE_AT_STOP <= PATIENCE_AT_END": "the last state of a run is worth more than that of an attempt",
    "LAST_LIMIT < RUN_TELL_LIMIT": "the process that sends the last alerts has time to start",
    "LAST_LIMIT < BESIDE_LIMIT": "the process that sends the last alerts ends by itself",
    "2 * BEAT_EVERY < SILENCE": "one sign of life that is late is no silence",
    "3 * LOAD_EVERY < GONE_AFTER": "a few samples may get lost",
}
"""What has to hold → why."""


def broken(values: Mapping[str, object]) -> list[str]:
    """The relations that do not hold with these values."""
    return [f"{relation}: {why}" for relation, why in RELATIONS.items() if not eval(relation, dict(values))]


if found := broken(globals()):
    raise RuntimeError(f"time limits that do not go together: {'; '.join(found)}")
