"""Where nodes come from: `cluster:`, `slurm:` and `elastic:`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raylaunch.config.schema.base import Environment, Line, Name, Nodes, NotNegative, Positive, Section, SlurmTime


class ClusterConfig(Section):
    """`cluster:` which cluster, and where everything known about it lies."""

    name: Name = "main"
    backend: Literal["auto", "slurm", "local"] = "auto"
    state_dir: Line | None = None
    """Shared by all nodes. Default: $RAYLAUNCH_STATE_DIR, else ~/.raylaunch."""
    temp_dir: Line = "/tmp"
    """Node-local; each cluster makes one directory in it on every node."""
    interface: Line | None = None
    """Network interface that Ray uses (ib0); default: the one that leads to the other nodes."""
    object_store_memory: Positive | None = None
    """Bytes per node; default: a tenth of the node's share, at most 1 GiB."""


class SlurmConfig(Section):
    """`slurm:` in Slurm's own words; see sbatch(1)."""

    job_name: Line | None = None
    nodes: Nodes = "1"
    ntasks_per_node: Positive | None = None
    """Training workers (ranks) per node. Default: one per GPU, else one."""
    gpus_per_node: Line | NotNegative | None = None
    gres: Line | None = None
    cpus_per_task: Positive | None = None
    mem: Line | Positive | None = None
    time: SlurmTime | None = None
    account: Line | None = None
    partition: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    reservation: Line | None = None
    nodelist: Line | None = None
    exclude: Line | None = None
    exclusive: bool = False
    mail_type: Line | None = None
    mail_user: Line | None = None
    signal: Annotated[str, Field(pattern=r"^B:(SIG)?USR1@[0-9]+$", examples=["B:USR1@120"])] = "B:USR1@120"
    """How many seconds before the time limit raylaunch is told, to save and end the run: B:USR1@SECONDS."""
    comment: Line | None = None
    env: Environment = Field(default_factory=dict)
    modules: list[Line] = Field(default_factory=list)
    setup: list[str] = Field(default_factory=list)
    """Shell lines run once per node before Ray starts."""
    extra: list[Line] = Field(default_factory=list)
    """Further sbatch options, passed as they are."""

    @property
    def min_nodes(self) -> int:
        return int(self.nodes.split(":")[0])

    @property
    def max_nodes(self) -> int:
        return int(self.nodes.split(":")[-1])


class JoinConfig(Section):
    """`elastic.join:` where further nodes come from: small jobs of their own (joiners)."""

    partition: Line | None = None
    """Named: idle nodes of it are taken up to elastic.max_nodes. Default: the base job's, for replacements."""
    qos: Line | None = None
    account: Line | None = None
    time: SlurmTime | None = None
    """Wall time of a joiner. Default: the base job's."""
    max_pending: Positive = 2
    """Joiner jobs that wait in the queue at the same time."""


class ElasticConfig(Section):
    """`elastic:` how long to go on, with how few and with how many."""

    min_nodes: Positive | None = None
    """A run holds below this many nodes.
    Default: the lower end of slurm.nodes for bring-up, 1 in training."""
    max_nodes: Positive | None = None
    """A cluster never grows above this many nodes. Default: the upper end of slurm.nodes."""
    replace: bool = True
    """A lost node is replaced by a joiner job."""
    join: JoinConfig = Field(default_factory=JoinConfig)
    scale_up_delay: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """Seconds that a new node must have been ready before the run grows onto it, at the next commit."""
    max_strikes: Positive = 3
    """A node that was lost or broken this often is excluded for the life of the cluster."""
    max_requeues: NotNegative = 100
    """How often the job goes on in another allocation after its time or its nodes ran out; 0: it ends."""
    max_identical_errors: Positive = 2
    """The same error this often with no commit between ends the run."""
    restart_backoff: Annotated[float, Field(ge=0, le=600)] = 1.0
    """Seconds before the second attempt without progress; doubles, at most 60."""
    min_nodes_timeout: Positive = 1800
    """Seconds that a run waits below its minimum of nodes before it gives up, saved."""
    hang_timeout: Annotated[float, Field(ge=5)] = 120.0
    """Seconds without a step, at the least, before a run counts as hung; see hang_factor."""
    hang_factor: Annotated[float, Field(ge=2)] = 20.0
    """This many times the median step without a step is a hang, when that is more than hang_timeout."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_nodes is not None and self.max_nodes is not None and self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes ({self.min_nodes}) exceeds max_nodes ({self.max_nodes})")
        return self
