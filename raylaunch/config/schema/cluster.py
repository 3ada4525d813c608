"""Where nodes come from: `cluster:`, `slurm:` and `elastic:`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raylaunch.config.schema.base import Environment, Line, Name, Nodes, NotNegative, Positive, Section, SlurmTime


class ClusterConfig(Section):
    """`cluster:` the name of the cluster, and where its files are."""

    name: Name = "main"
    """Name of the cluster. Its directory has this name, and its Slurm job is called `raylaunch-NAME`. Example:
    `big`."""
    backend: Literal["auto", "slurm", "local"] = "auto"
    """Where nodes come from: `slurm`, or `local` processes on this machine. `auto` uses Slurm if `sbatch` is installed
    and finds its configuration, else `local`. Example: `local`."""
    state_dir: Line | None = None
    """Directory for clusters and runs, on a file system that all nodes and the login node share. Default:
    `$RAYLAUNCH_STATE_DIR`, else `~/.raylaunch`. Example: `/shared/me/raylaunch`."""
    temp_dir: Line = "/tmp"
    """Node-local directory. Each cluster creates one directory in it on every node. Example: `/scratch`."""
    interface: Line | None = None
    """Network interface for Ray, NCCL and Gloo. Default: the interface that routes to the other nodes. Example:
    `ib0`."""
    object_store_memory: Positive | None = None
    """Size of Ray's object store in bytes per node. Default: a tenth of the node's memory, at most 1 GiB. Example:
    `2147483648`."""


class SlurmConfig(Section):
    """`slurm:` the Slurm allocation. Keys are named after the options of sbatch(1)."""

    job_name: Line | None = None
    """Name of the Slurm job (`--job-name`). Default: `raylaunch-NAME`, with the name of the cluster. Example:
    `llama`."""
    nodes: Nodes = "1"
    """Number of nodes, or a range `MIN:MAX` (`--nodes`). The cluster starts with MIN nodes and grows up to MAX.
    Example: `"2:8"`."""
    ntasks_per_node: Positive | None = None
    """Training workers (ranks) per node. Default: one per GPU, or one on nodes without GPUs. Example: `4`."""
    gpus_per_node: Line | NotNegative | None = None
    """GPUs per node, optionally with a type (`--gpus-per-node`). Example: `8`."""
    gres: Line | None = None
    """Generic resources per node (`--gres`). Example: `gpu:a100:4`."""
    cpus_per_task: Positive | None = None
    """CPUs per training worker (`--cpus-per-task`). Example: `8`."""
    mem: Line | Positive | None = None
    """Memory per node (`--mem`). A number without a unit is in MiB. Example: `200G`."""
    time: SlurmTime | None = None
    """Time limit of the job (`--time`): minutes, `HH:MM:SS` or `D-HH:MM:SS`. Example: `"1-00:00:00"`."""
    account: Line | None = None
    """Account to charge (`--account`). Example: `physics`."""
    partition: Line | None = None
    """Partition (`--partition`). Example: `gpu`."""
    qos: Line | None = None
    """Quality of service (`--qos`). Example: `normal`."""
    constraint: Line | None = None
    """Required node features (`--constraint`). Example: `a100`."""
    reservation: Line | None = None
    """Reservation to use (`--reservation`). Example: `workshop`."""
    nodelist: Line | None = None
    """Nodes that the job must include (`--nodelist`). Example: `node[01-04]`."""
    exclude: Line | None = None
    """Nodes that the job must not use (`--exclude`). Example: `node07`."""
    exclusive: bool = False
    """Do not share nodes with other jobs (`--exclusive`). Example: `true`."""
    mail_type: Line | None = None
    """Job events for which Slurm sends mail (`--mail-type`). Example: `END,FAIL`."""
    mail_user: Line | None = None
    """Recipient of Slurm's mail (`--mail-user`). Example: `me@example.org`."""
    signal: Annotated[str, Field(pattern=r"^B:(SIG)?USR1@[0-9]+$", examples=["B:USR1@120"])] = "B:USR1@120"
    """When Slurm notifies raylaunch before the time limit (`--signal`), as `B:USR1@SECONDS`. raylaunch then saves a
    checkpoint and ends the run. Example: `"B:USR1@300"`."""
    comment: Line | None = None
    """Comment of the job (`--comment`). Example: `ablation 3`."""
    env: Environment = Field(default_factory=dict)
    """Environment variables for everything that runs on the nodes. `${NAME}` refers to a variable of the shell that
    submits, and its value is never written to a file. Example: `{HF_HOME: /shared/hf}`."""
    modules: list[Line] = Field(default_factory=list)
    """Environment modules to load on each node (`module load`), in order. Example: `[cuda/12.4, gcc/13]`."""
    setup: list[str] = Field(default_factory=list)
    """Shell commands to run once per node before Ray starts. Example: `["source /shared/venv/bin/activate"]`."""
    extra: list[Line] = Field(default_factory=list)
    """Additional sbatch options, passed unchanged. Example: `["--licenses=foo:1"]`."""

    @property
    def min_nodes(self) -> int:
        return int(self.nodes.split(":")[0])

    @property
    def max_nodes(self) -> int:
        return int(self.nodes.split(":")[-1])


class JoinConfig(Section):
    """`elastic.join:` the small Slurm jobs (joiners) that add nodes to a running cluster."""

    partition: Line | None = None
    """Partition for joiners. If it is set, raylaunch also adds idle nodes of this partition, up to `elastic.max_nodes`.
    Default: the partition of the base job, for replacements only. Example: `preemptible`."""
    qos: Line | None = None
    """Quality of service for joiners. Default: that of the base job. Example: `low`."""
    account: Line | None = None
    """Account for joiners. Default: that of the base job. Example: `physics`."""
    time: SlurmTime | None = None
    """Time limit of a joiner. Default: that of the base job. Example: `"4:00:00"`."""
    max_pending: Positive = 2
    """Maximum number of pending joiner jobs. Example: `4`."""


class ElasticConfig(Section):
    """`elastic:` the limits within which training continues when nodes come and go."""

    min_nodes: Positive | None = None
    """Minimum number of nodes. Training pauses while fewer are available. Default: the lower bound of `slurm.nodes` for
    bring-up, 1 for training. Example: `2`."""
    max_nodes: Positive | None = None
    """Maximum number of nodes of the cluster. Default: the upper bound of `slurm.nodes`. Example: `8`."""
    replace: bool = True
    """Replace a lost node by submitting a small job (a joiner) for a new one. Example: `false`."""
    join: JoinConfig = Field(default_factory=JoinConfig)
    scale_up_delay: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """Seconds that a new node must be ready before training scales up onto it, at the next checkpoint. Example:
    `60`."""
    max_strikes: Positive = 3
    """Exclude a node for the lifetime of the cluster after it was lost or failed this many times. Example: `5`."""
    max_requeues: NotNegative = 100
    """Maximum number of times that the job continues in a new allocation after its time limit, a preemption or the loss
    of its nodes. 0: the run ends with the allocation. Example: `10`."""
    max_identical_errors: Positive = 2
    """End the run after the same error has occurred this many times without a checkpoint in between. Example: `3`."""
    restart_backoff: Annotated[float, Field(ge=0, le=600)] = 1.0
    """Seconds before the second restart without progress. Doubles with each further one, up to 60 seconds. Example:
    `5`."""
    min_nodes_timeout: Positive = 1800
    """Seconds to wait for `elastic.min_nodes` before the run ends, with its last checkpoint kept. Example: `7200`."""
    hang_timeout: Annotated[float, Field(ge=5)] = 120.0
    """The run counts as hung after this many seconds without a completed step, or after `elastic.hang_factor` times
    the median step time, whichever is longer. Example: `300`."""
    hang_factor: Annotated[float, Field(ge=2)] = 20.0
    """The time limit for a step, as a multiple of the median step time. At least `elastic.hang_timeout`. Example:
    `50`."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_nodes is not None and self.max_nodes is not None and self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes ({self.min_nodes}) exceeds max_nodes ({self.max_nodes})")
        return self
