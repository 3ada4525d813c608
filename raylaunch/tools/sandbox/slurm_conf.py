"""The text of Slurm's configuration files for a sandbox: pure functions of its `SandboxSpec`.

The settings are those of a small site, with two aims: short waits, and every behaviour
that raylaunch must live with (preemption, requeue, time limits, dead nodes) within reach.
"""

from __future__ import annotations

from raylaunch.tools.sandbox.spec import CONTROLLER, SandboxLayout, SandboxSpec

GPU_DEVICE = "/dev/fakegpu"  # not nvidiaN: nothing may mistake a stand-in for a real one


def slurm_conf(spec: SandboxSpec, layout: SandboxLayout) -> str:
    lines = [
        f"ClusterName={spec.name}",
        f"SlurmctldHost={CONTROLLER}({spec.gateway})",
        f"SlurmctldPort={spec.ctld_port}",
        # Listen on the bridge only: sandboxes side by side do not meet, nor the outside.
        "CommunicationParameters=NoCtldInAddrAny",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        # The socket is named here, so that clients of any user need SLURM_CONF and no more.
        # A requeued job waits for its old credentials to expire: 120 s by default.
        f"AuthInfo=socket={layout.munge_socket},cred_expire=20",
        f"StateSaveLocation={layout.spool}/slurmctld",
        f"SlurmdSpoolDir={layout.spool}/%n",
        f"SlurmctldPidFile={layout.run}/slurmctld.pid",
        f"SlurmdPidFile={layout.run}/%n.slurmd.pid",
        f"SlurmctldLogFile={layout.log}/slurmctld.log",
        f"SlurmdLogFile={layout.log}/%n.slurmd.log",
        "MailProg=/bin/true",
        "MpiDefault=none",
        # More CPUs than the machine has: believe the lines below and bind nothing.
        "SlurmdParameters=config_overrides",
        "TaskPlugin=task/none",
        f"ProctrackType=proctrack/{'cgroup' if spec.cgroup_proctrack else 'linuxproc'}",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        f"DefMemPerCPU={max(1, spec.memory // spec.cpus)}",
        # Faults: notice early, give nodes back, requeue.
        "ReturnToService=1",
        # MessageTimeout is what Slurm's notice of a dead node hangs on: DOWN after 26-31 s with
        # the default of 10, after 10-16 s with 3, whatever SlurmdTimeout from 3 to 15.
        "MessageTimeout=5",
        "SlurmdTimeout=10",
        "SlurmctldTimeout=30",
        "JobRequeue=1",
        "KillWait=30",
        "MinJobAge=60",
        "UnkillableStepTimeout=30",
        # Preemption by partition; the user's --signal is sent when the grace begins.
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SlurmctldParameters=preempt_send_user_signal",
        "SchedulerType=sched/backfill",
        # A batch job starts within 1 s (3 s by default): Slurm's own loop turns once a second.
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1",
        "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherFrequency=5",
        "JobCompType=jobcomp/filetxt",  # `sacct -c` answers without slurmdbd
        f"JobCompLoc={layout.log}/jobcomp.log",
        *_accounting(spec, layout),
        *(["GresTypes=gpu"] if spec.gpus else []),
    ]
    return "\n".join([*lines, *_nodes(spec), *_partitions(_range("node", spec.nodes, start=1))]) + "\n"


def _nodes(spec: SandboxSpec) -> list[str]:
    gres = f" Gres=gpu:{spec.gpus}" if spec.gpus else ""
    return [
        f"NodeName={node} NodeAddr={spec.address(node)} CPUs={spec.cpus} Boards=1 SocketsPerBoard=1"
        f" CoresPerSocket={spec.cpus} ThreadsPerCore=1 RealMemory={spec.memory}{gres} State=UNKNOWN"
        for node in spec.node_names
    ]


def _partitions(nodes: str) -> list[str]:
    partition = "PartitionName={} OverSubscribe=NO Nodes={}"
    return [
        f"{partition.format('main', nodes)} Default=YES PriorityTier=10 PreemptMode=OFF"
        " DefaultTime=1:00:00 MaxTime=1-00:00:00",
        f"{partition.format('low', nodes)} PriorityTier=1 PreemptMode=REQUEUE GraceTime=10"
        " DefaultTime=1:00:00 MaxTime=1-00:00:00",
        f"{partition.format('lowc', nodes)} PriorityTier=1 PreemptMode=CANCEL GraceTime=10"
        " DefaultTime=1:00:00 MaxTime=1-00:00:00",
        f"{partition.format('small', 'node1')} PriorityTier=10 PreemptMode=OFF DefaultTime=5 MaxTime=10",
        f"{partition.format('down', nodes)} PriorityTier=10 PreemptMode=OFF State=DOWN",
    ]


def cgroup_conf() -> str:
    # v1 by name: the automatic choice looks for systemd's directories, which nodes lack.
    return "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"


def gres_conf(spec: SandboxSpec) -> str:
    if not spec.gpus:
        return ""
    devices = _range(GPU_DEVICE, spec.gpus, start=0)
    return f"NodeName={_range('node', spec.nodes, start=1)} Name=gpu File={devices}\n"


def slurmdbd_conf(spec: SandboxSpec, layout: SandboxLayout) -> str:
    return "\n".join(
        [
            "AuthType=auth/munge",
            f"AuthInfo=socket={layout.munge_socket}",
            f"DbdHost={CONTROLLER}",
            f"DbdAddr={spec.gateway}",
            f"DbdPort={spec.dbd_port}",
            "SlurmUser=root",
            f"LogFile={layout.log}/slurmdbd.log",
            f"PidFile={layout.run}/slurmdbd.pid",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=root",
            "StorageLoc=slurm_acct",
            "",
        ]
    )


def hosts(spec: SandboxSpec) -> str:
    """/etc/hosts of every node: a node's own name is its address on the bridge, not loopback."""
    lines = ["127.0.0.1 localhost", f"{spec.gateway} {CONTROLLER}"]
    lines += [f"{spec.address(node)} {node}" for node in spec.node_names]
    return "\n".join(lines) + "\n"


def _accounting(spec: SandboxSpec, layout: SandboxLayout) -> list[str]:
    if not spec.accounting:
        return ["AccountingStorageType=accounting_storage/none"]
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        f"AccountingStorageHost={spec.gateway}",
        f"AccountingStoragePort={spec.dbd_port}",
        # The "password" is the munge socket; without it slurmctld ends at start.
        f"AccountingStoragePass={layout.munge_socket}",
        *(["AccountingStorageTRES=gres/gpu"] if spec.gpus else []),
    ]


def _range(prefix: str, count: int, start: int) -> str:
    return f"{prefix}{start}" if count == 1 else f"{prefix}[{start}-{start + count - 1}]"
