"""Time limits that depend on each other, in seconds, and the relations that must hold between them.

A limit that nothing else depends on stands where it is used. These stand here, so that whoever changes one sees the
others: most are derived, and RELATIONS is checked whenever this module is imported.
"""

from __future__ import annotations

from collections.abc import Mapping

# Slurm's defaults
SLURMD_TIMEOUT = 300.0
"""After this time without an answer, slurmctld marks a node down."""
KILL_WAIT = 30.0
"""From SIGTERM to SIGKILL."""

# Connections between agents (control_channel)
PING_EVERY = 0.5
PING_LIMIT = 6 * PING_EVERY
"""After this time without a message, the other side counts as gone."""
HANDSHAKE_LIMIT = 5.0
ASK_LIMIT = 1.5
"""Time for another agent to answer whether it sees the head."""
ALREADY_LIMIT = PING_LIMIT + 2.0
"""How long an agent retries when another job's agent holds the node: a dead one is detected by then."""

# Looking for a head (seek, election)
FILES_EVERY = 0.3
SLURM_EVERY = 5.0
CONNECT_LIMIT = 2.0
VERDICT = PING_LIMIT + 1.5
"""Within this time, a living head that cannot reach us marks us lost in members.json."""
TOGETHER = 10.0
"""A head that is cut off may detect the losses of one cut this far apart."""
LONELY = 1.0
"""How long the only other node waits for a message of the head, even after the connection closed."""
TURN = ASK_LIMIT
"""How long each candidate waits for the one before it."""
PUBLISH_LIMIT = 15.0
"""Time for the winner of an election to publish its address."""
PATIENCE = 600.0
"""A node without a head gives up after this time. It is longer than the reboot of a switch, and longer than Slurm takes
to mark dead nodes down: without that, the smaller part of the nodes has no majority."""

# Nodes that come, and come back (agent, head, node_loop)
CANARY_PATIENCE = 10.0
"""NFS may show a new file late."""
CONNECT_PATIENCE = 20.0
COMPANY_PATIENCE = CONNECT_PATIENCE
"""How long a head that must leave waits for a node that takes over."""
FOLLOW_LIMIT = 20.0
"""Time for the nodes to connect to a new head."""
BLAME_AFTER = 2.0
"""Delay from the loss of a node to its strike: by then it is known whether most nodes are lost, or the node is back."""
REJOIN_GRACE = 5.0
"""Time for a lost node to return before a joiner is submitted for it."""
BOOT_LIMIT = 180.0
"""After the start of its job, a node that has not connected counts as starting for this time."""

# The end of a node, a cluster, an allocation (agent, head, drivers, teardown, allocation)
TREE_LIMIT = 5.0
"""Time to end all processes of a node."""
LOG_PATIENCE = 2.0
"""How long an agent waits at its end for the last lines of its log."""
TERM_LIMIT = 20.0
"""Time after SIGTERM for the run to leave the head's node."""
TERM_PATIENCE = TERM_LIMIT
"""How long a node waits after SIGTERM for the head's order to end."""
ENDING_LIMIT = 2 * TREE_LIMIT
"""How long the head waits for the last reports of the nodes."""
TELL_LIMIT = 8.0
"""Time to send the alerts of a run whose driver could not, while the cluster ends."""
ALLOCATION_ENDING = ENDING_LIMIT + TREE_LIMIT
"""Time to end the agents and to requeue."""
DOWN_LIMIT = ENDING_LIMIT + TELL_LIMIT + 2.0
"""How long `raylaunch down` waits for the head to end, in addition to the time to save."""
TAKEN_LIMIT = 15.0
"""Within this time a living head takes a request."""
GONE_LIMIT = 2 * KILL_WAIT
"""Time from a cancel to the end of the jobs."""

# Saving and telling at the end of a run (loop, trainers, head, beside, alerts)
PATIENCE_AT_STOP, PATIENCE_AT_END = 60.0, 600.0
"""How long the last save of an attempt, and of the run, is repeated if it fails."""
SAVE_LIMIT = PATIENCE_AT_STOP
"""Time for a run to save when the cluster ends, unless the request has another limit."""
LAST_LIMIT = 15.0
"""How long the end of a run waits for the destinations of its alerts."""
RUN_TELL_LIMIT = LAST_LIMIT + 10.0
"""The same, in a process that is started for a run whose driver is dead."""
BESIDE_LIMIT = 2 * LAST_LIMIT
"""How long the end of a run waits for its sidecar processes."""

# Signs of life and load (pulse, watchdog, load)
BEAT_EVERY = 2.0
SILENCE = 5.0
"""After this time without a heartbeat, a worker counts as silent."""
LOAD_EVERY = 5.0
"""Interval of the samples of a node's load, and of the writes of the latest ones."""
GONE_AFTER = 60.0
"""After this time without a sample, a node is not part of the mean load."""

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
