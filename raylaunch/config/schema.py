"""The typed configuration: one model per section of the YAML file.

Strict: an unknown key, a wrong type or an impossible value is an error. Reading files, layering
and line numbers are in `configfile`; this module is the schema and what follows from it.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic.fields import FieldInfo
from pydantic.functional_validators import AfterValidator, BeforeValidator

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(value: str) -> str:
    """A name becomes a directory, a job name and part of a socket path: keep it plain."""
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError("a name has 1 to 63 letters, digits, '.', '_' or '-', and starts with a letter or digit")
    return value


def parse_nodes(value: object) -> str:
    """`4` or `2:8` (Slurm's own `2-8` is understood too), at least one, as the canonical text."""
    text = str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"([0-9]+)(?:[:-]([0-9]+))?", text)
    if match is None:
        raise ValueError("nodes is a number (4) or a range (2:8)")
    low = int(match[1])
    high = int(match[2]) if match[2] else low
    if low < 1:
        raise ValueError("nodes must be at least 1")
    if high < low:
        raise ValueError(f"the range {low}:{high} is upside down")
    return str(low) if low == high else f"{low}:{high}"


TIME_PATTERN = re.compile(
    r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE", re.IGNORECASE | re.ASCII
)


def parse_time(value: object) -> str:
    """Slurm's time formats, as text; a number is minutes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and TIME_PATTERN.fullmatch(value.strip()):
        return value.strip()
    raise ValueError("time is minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes[:seconds]]")


def check_line(value: str) -> str:
    """What becomes part of one line of the script: an empty one or a second line would break it."""
    if not value.strip() or not value.isprintable():
        raise ValueError("must be one line of text, not empty and without control characters")
    return value


def check_variable(name: str) -> str:
    """An environment variable's name; anything else would be code in the script's `export` line."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("a variable's name has letters, digits and '_', and starts with no digit")
    return name


def check_environment_value(value: str) -> str:
    """The kernel ends a variable's value at a NUL byte."""
    if "\0" in value:
        raise ValueError("must be text without NUL bytes")
    return value


URL_PATTERN = re.compile(r"https?://[!-~]+")


def check_address(value: SecretStr) -> SecretStr:
    """A webhook's address, or where it is found. What is wrong with it is said without it."""
    text = value.get_secret_value()
    if not (URL_PATTERN.fullmatch(text) or re.fullmatch(r"env:[A-Za-z_]\w*|file:.+", text)):
        raise ValueError("must be an address (https://...), env:NAME or file:PATH")
    return value


Name = Annotated[str, AfterValidator(check_name)]
Address = Annotated[SecretStr, AfterValidator(check_address)]
Line = Annotated[str, AfterValidator(check_line)]
Environment = dict[
    Annotated[str, AfterValidator(check_variable)], Annotated[str, AfterValidator(check_environment_value)]
]
Nodes = Annotated[str, BeforeValidator(parse_nodes)]
SlurmTime = Annotated[str, BeforeValidator(parse_time)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
SCRIPT_ENTRY = "raylaunch.trainers.script:run"


class Section(BaseModel):
    """What all sections share: unknown keys refused, values immutable, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    shorthand: ClassVar[str | None] = None
    """The key that a plain value in place of the section stands for."""


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
    grow_after: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """Seconds that a new node must have been ready before the run grows onto it, at the next commit."""
    max_strikes: Positive = 3
    """A node that was lost or broken this often is excluded for the life of the cluster."""
    max_requeues: NotNegative = 100
    """How often the job goes on in another allocation after its time or its nodes ran out; 0: it ends."""
    max_same_error: Positive = 2
    """The same error this often with no commit between ends the run."""
    backoff: Annotated[float, Field(ge=0, le=600)] = 1.0
    """Seconds before the second attempt without progress; doubles, at most 60."""
    hold_timeout: Positive = 1800
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


class TrainerConfig(Section):
    """`trainer:` what each worker runs: a function, whose name may be written alone, or a script."""

    shorthand: ClassVar[str | None] = "function"

    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$", examples=["trainers.fsdp:train"])] = "trainers.fsdp:train"
    """A function `(config, session)`. `trainers.x` is your module if you have one, else raylaunch's own."""
    script: Line | None = None
    """In place of a function: a script as `torchrun` would start it, one process a worker, with its variables.
    A relative path is one in chdir."""
    args: list[str] = Field(default_factory=list)
    """The script's arguments."""
    chdir: Line | None = None
    """A script's working directory; a function's module is looked for there first. Default: that of the command line."""
    stop_signal: Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"] = "SIGTERM"
    """What the script gets when the run is to stop, for it to save."""
    stop_timeout: Annotated[float, Field(ge=0)] = 30.0
    """Seconds from stop_signal to SIGKILL."""
    grow: bool = False
    """Stop a script and start it again when nodes come; else it grows when it starts again for another reason."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.script is not None and self.function != type(self).model_fields["function"].default:
            raise ValueError(f"function ({self.function}) and script ({self.script}): give one of them")
        return self

    @property
    def entry(self) -> str:
        """The function that a worker calls."""
        return self.function if self.script is None else SCRIPT_ENTRY


SIZES: dict[str, dict[str, int]] = {
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 192},
    "1M": {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 384},
    "10M": {"dim": 320, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 864},
    "125M": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "ffn_dim": 2048},
    "1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 8192},
    "8B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 14336},
}


class LoraConfig(Section):
    """`model.lora:` train small adapters of a model of `model.hf`, and save only them (peft's LoRA)."""

    rank: NotNegative = 0
    """0: train the model itself."""
    alpha: Positive | None = None
    """Default: twice the rank."""
    dropout: Share = 0.0
    target_modules: list[Line] = Field(default_factory=list)
    """Default: all linear ones but the head."""


class ModelConfig(Section):
    """`model:` a Llama-style decoder; `size` names a shape, the other keys override it. Or `hf`."""

    hf: Line | None = None
    """In place of the decoder: a causal language model of transformers, by path or by name. Needs raylaunch[hf]."""
    hf_init: Literal["pretrained", "random"] = "pretrained"
    """Begin with its weights, or with fresh ones of its shape."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    target: Annotated[str, Field(pattern=r"^[\w.]+[.:]\w+$", examples=["package.module:function"])] | None = None
    """In place of the decoder: a function or class that makes a module from tokens [B, S] to logits [B, S, vocab_size].
    Written as `_target_`, all other keys of the section are its arguments."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """The arguments of target."""
    size: Literal["tiny", "1M", "10M", "125M", "1B", "8B"] = "1M"
    dim: Positive = 128
    n_layers: Positive = 4
    n_heads: Positive = 4
    n_kv_heads: Positive = 2
    ffn_dim: Positive = 384
    vocab_size: Annotated[int, Field(ge=257)] = 264
    """Bytes and one separator are 257; 264 divides by eight."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    n_experts: NotNegative = 0
    """A mixture of so many experts in each block, each of ffn_dim; 0: none."""
    n_experts_per_token: Positive = 2
    router_aux_loss: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the loss that balances the load of the experts."""
    init_from: Line | None = None
    """Begin with these weights: a directory in Hugging Face's Llama layout (config.json, *.safetensors)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, values: Any) -> Any:
        """A named size gives the shape; keys that are written win over it."""
        if isinstance(values, dict):
            size = values.get("size", "1M")
            return {**(SIZES.get(size, {}) if isinstance(size, str) else {}), **values}
        return values

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.dim % self.n_heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of n_heads ({self.n_heads})")
        if (self.dim // self.n_heads) % 2:
            raise ValueError(f"dim / n_heads ({self.dim // self.n_heads}) must be even: RoPE turns pairs")
        if self.hf is not None and self.target is not None:
            raise ValueError("hf and _target_: give one of them")
        if (self.hf is not None or self.target is not None) and (self.init_from is not None or self.n_experts):
            raise ValueError("hf and _target_ go without init_from and n_experts: they are whole models")
        if self.lora.rank and self.hf is None:
            raise ValueError("lora is for a model of model.hf")
        if self.n_experts and self.n_experts_per_token > self.n_experts:
            raise ValueError(f"n_experts_per_token ({self.n_experts_per_token}) exceeds n_experts ({self.n_experts})")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        return self


STDLIB = "stdlib:"
LEAST_SHARE = 0.001
"""Of a mixture, for any of its parts."""


class DataConfig(Section):
    """`data:` text byte by byte, or what `raylaunch data prepare` made of documents."""

    text: list[str] = Field(default_factory=lambda: [STDLIB], min_length=1)
    """Files, directories, globs, or `stdlib:` for Python's own library source."""
    prepared: str | None = None
    """In place of `text`: a directory that `raylaunch data prepare` made."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """In place of `text`: several such directories, each with its weight; samples are taken in these proportions."""
    validation: str | None = None
    """A prepared directory to validate on. Default: val_fraction of what is trained on, held out."""
    document_mask: bool | None = None
    """Attention stays inside a document, and no document is predicted from the one before. Default: for conversations."""
    seq_len: Annotated[int, Field(ge=2)] = 256
    val_fraction: Share = 0.01
    seed: NotNegative = 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = {"text": self.text != [STDLIB], "prepared": self.prepared is not None, "mixture": bool(self.mixture)}
        if sum(given.values()) > 1:
            raise ValueError(f"{' and '.join(key for key, is_set in given.items() if is_set)}: give one of them")
        for path, weight in self.mixture.items():
            if weight < LEAST_SHARE * sum(self.mixture.values()):
                raise ValueError(f"mixture: {path} has less than {LEAST_SHARE:.1%} of the weight")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The prepared directories to train on, in order, with their weights; none: `text`."""
        return {self.prepared: 1.0} if self.prepared is not None else dict(sorted(self.mixture.items()))


class OptimizerConfig(Section):
    """`optimizer:`."""

    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of what is trained, with this decay (0.999, say); validated beside it as
    `val_loss_ema`, and what save_consolidated writes."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient that is no number: end the run, leave the step out, or go back to the last
    commit and leave that batch out. The last two wait for each step's result before the update."""


class StepSchedulerConfig(Section):
    """`step_scheduler:` how many steps of how many samples, and what happens every so many."""

    max_steps: Positive = 200
    local_batch_size: Positive = 8
    """Samples per worker and pass."""
    grad_acc_steps: Positive | None = None
    """Passes per step at the size the run starts with; fixes the global batch from then on."""
    global_batch_size: Positive | None = None
    """Samples per step, a constant of the run at any number of workers."""
    ckpt_every_steps: Positive = 50
    val_every_steps: NotNegative = 50
    """0: never."""
    val_batches: Positive = 4
    warmup_steps: NotNegative = 10
    lr_decay_style: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up; wsd (warm-up, stable, decay): constant, then linear over the last lr_decay_steps."""
    lr_decay_steps: Positive | None = None
    """Of wsd. Default: a tenth of max_steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The decay ends at this share of lr."""

    @model_validator(mode="before")
    @classmethod
    def _short_warmup(cls, values: Any) -> Any:
        """The default warmup must not make a run of five steps, as one tries things with, an error."""
        if isinstance(values, dict) and "warmup_steps" not in values:
            steps = values.get("max_steps")
            if type(steps) is int and 0 < steps < 10:  # True is an int too, and a mistake here
                return {**values, "warmup_steps": steps}
        return values

    @model_validator(mode="after")
    def _one_batch(self) -> Self:
        if self.grad_acc_steps is not None and self.global_batch_size is not None:
            raise ValueError("give grad_acc_steps or global_batch_size, not both")
        return self


class DistributedConfig(Section):
    """`distributed:`."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = "fsdp"
    """ddp: each worker has the whole model; fsdp: a shard of it; hsdp: shards inside a node, whole on each node."""
    tp_size: Positive = 1
    """Tensor parallel: so many workers share each layer's products, and the tokens between them. Best inside a node."""
    cp_size: Positive = 1
    """Context parallel: so many workers share the tokens of each sample."""
    pp_size: Positive = 1
    """Pipeline parallel: so many stages, each with a part of the blocks. More micro-batches a step (see
    step_scheduler.local_batch_size) keep them busy."""
    ep_size: Positive = 1
    """Expert parallel: so many workers share the experts of each block, and send each other their tokens."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again, to save memory: nothing, all but products and attention, or all of a block."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; auto: bfloat16 on GPU, float32 on CPU. Parameters are kept in float32."""
    cpu_offload: bool = False
    """Parameters, gradients and optimizer states lie in the host's memory, and are copied to the GPU block by block."""
    float8: bool = False
    """The products of the blocks in float8, where the GPU has it (H100 and newer). Needs raylaunch[float8]."""
    compile: bool = False
    """torch.compile, block by block; what it makes is kept in the run directory for the next attempt. Not with tp_size."""
    comm_timeout: Positive = 600
    """Seconds after which a collective that does not complete is an error."""

    @property
    def model_parallel(self) -> int:
        """Workers that hold together: a world has a multiple of these. (Experts are shared by data-parallel workers.)"""
        return self.pp_size * math.lcm(self.tp_size * self.cp_size, self.ep_size)


class CheckpointConfig(Section):
    """`checkpoint:`."""

    checkpoint_dir: str | None = None
    """Shared by all nodes. Default: `checkpoints` in the run directory."""
    keep_last_n_checkpoints: Positive = 2
    keep_every_n_steps: NotNegative = 0
    """Those of every so many steps stay for good; 0: none."""
    keep_best: bool = False
    """The one with the lowest val_loss stays, of those that were saved right after a validation."""
    async_save: bool = False
    """The steps wait for a copy of the state in memory, and not for the storage."""
    async_checkpointer_type: Literal["thread", "process"] = "thread"
    """Where the copy is written from. A process beside each worker (about 0.4 GB of its own) leaves the steps all of
    Python; a thread costs nothing more than the copy."""
    save_consolidated: bool = False
    """When the run is finished, write its weights into `model` in the run directory, as safetensors that the model's own
    loader reads. The run counts as finished before that. The export is ended after two hours, or
    one minute after another run began to wait. If it fails, or the head's node dies meanwhile, nothing of the run is lost: the event `export_failed` has the
    command that tries again, `raylaunch checkpoints RUN export latest --to DIR`."""

    @property
    def background(self) -> Literal["thread", "process"] | None:
        """Where saves run beside the steps; None: they do not."""
        return self.async_checkpointer_type if self.async_save else None


class LoggingConfig(Section):
    """`logging:`."""

    log_every_steps: Positive = 1
    """Steps between two lines of metrics.jsonl; the last step always has one."""
    profile_steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """The first and the last step to trace with torch's profiler, into `profile` in the run directory."""
    memory_snapshots: bool = False
    """What lay in a GPU's memory when it ran out, into `memory` in the run directory; costs some speed."""
    tensorboard: bool = False
    """Event files for it, in the run directory."""

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps ({self.profile_steps}) is upside down")
        return self


class WandbConfig(Section):
    """`wandb:` Weights & Biases; on when it has a project. Needs raylaunch[wandb], and WANDB_API_KEY or ~/.netrc."""

    project: Line | None = None
    entity: Line | None = None
    name: Line | None = None
    """Default: the run's name."""
    group: Line | None = None
    tags: list[Line] = Field(default_factory=list)
    mode: Literal["online", "offline"] = "online"
    """offline: into the run directory, for `wandb sync`."""


class MlflowConfig(Section):
    """`mlflow:` on when it has an experiment. Needs raylaunch[mlflow]."""

    experiment: Line | None = None
    tracking_uri: Line | None = None
    """Default: MLFLOW_TRACKING_URI."""


AlertKind = Literal[
    "started", "node_lost", "recovered", "held", "stalled", "loss_spike", "nan", "checkpoint_failed", "checkpoint_late",
    "gpu", "walltime", "finished", "stopped", "failed",
]  # fmt: skip


class AlertsConfig(Section):
    """`alerts:` be told what happens to a run, by one or more of slack, webhook, command and mail (docs/alerts.md)."""

    slack: Address | None = None
    """An incoming webhook of Slack's, or of what understands them (Mattermost, Rocket.Chat): its address, `env:NAME` or
    `file:PATH`. It is a secret."""
    webhook: Address | None = None
    """Gets each alert as JSON, by POST. A secret, too."""
    command: list[Line] = Field(default_factory=list)
    """A command, word by word and without a shell, that gets each alert as JSON on its stdin, on the head's node."""
    mail: Annotated[str, Field(pattern=r"^[^\s@-][^\s@]*(@[^\s@]+)?$", examples=["me@example.org"])] | None = None
    """An address. Slurm mails the states of the job (slurm.mail_type), the head's node the rest if it has a mailer."""
    kinds: Annotated[list[AlertKind], Field(min_length=1)] = [*get_args(AlertKind)]
    """Those that are wanted. Default: all."""
    min_interval: Annotated[float, Field(ge=0)] = 300.0
    """Seconds between two alerts of one kind about one thing; what comes sooner is folded into the next."""
    max_per_hour: Positive = 20
    """Of all kinds; further ones come together, later. What is critical and the end of the run come in any case."""
    stall_factor: Annotated[float, Field(ge=2)] = 10.0
    """A stall: no line of metrics for this many times the median time between two, and for stall_least."""
    stall_least: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that are no stall yet; 600 are none while a checkpoint or a validation may be under way."""
    held_after: Annotated[float, Field(ge=0)] = 60.0
    """Seconds below the minimum of nodes until that is told."""
    loss_spike: Annotated[float, Field(gt=0)] = 6.0
    """A spike: the mean of three losses is this many times their usual spread above the median of the hundred before."""
    checkpoint_late: Annotated[float, Field(ge=1)] = 2.0
    """Late: no commit for this many times step_scheduler.ckpt_every_steps."""
    walltime_left: NotNegative = 1800
    """Seconds before the end of the allocation; told if the run will hardly be done by then. 0: never."""

    @property
    def sinks(self) -> list[str]:
        """Where alerts go."""
        on = {"slack": self.slack, "webhook": self.webhook, "command": self.command, "mail": self.mail}
        return [name for name, value in on.items() if value]

    @property
    def addresses(self) -> dict[str, SecretStr]:
        """The secrets, by key."""
        return {name: value for name, value in (("slack", self.slack), ("webhook", self.webhook)) if value is not None}


class CostConfig(Section):
    """`cost:` prices, for `raylaunch report`; each is optional, and what is given adds up."""

    gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """Of one GPU that is held for an hour."""
    node_hour: Annotated[float, Field(ge=0)] | None = None
    """Of one node that is held for an hour."""
    currency: Line = "USD"


class Config(Section):
    """The whole file."""

    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    step_scheduler: StepSchedulerConfig = Field(default_factory=StepSchedulerConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    mlflow: MlflowConfig = Field(default_factory=MlflowConfig)
    alerts: AlertsConfig = Field(default_factory=AlertsConfig)
    cost: CostConfig = Field(default_factory=CostConfig)

    @property
    def trackers(self) -> list[str]:
        """The trackers that are turned on."""
        on = {
            "wandb": self.wandb.project is not None,
            "mlflow": self.mlflow.experiment is not None,
            "tensorboard": self.logging.tensorboard,
        }
        return [name for name, is_on in on.items() if is_on]

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        steps = self.step_scheduler
        if steps.warmup_steps > steps.max_steps:
            raise ValueError(
                f"step_scheduler.warmup_steps ({steps.warmup_steps}) exceeds max_steps ({steps.max_steps})"
            )
        return self

    @model_validator(mode="after")
    def _plan_fits(self) -> Self:
        plan, model, length = self.distributed, self.model, self.data.seq_len
        if plan.model_parallel > 1 and (model.hf is not None or model.target is not None):
            raise ValueError(
                "model.hf and model._target_ go with data parallel plans: distributed.tp_size, cp_size, pp_size and "
                "ep_size must be 1"
            )
        if plan.compile and plan.tp_size > 1:
            raise ValueError(
                "distributed.compile and tp_size > 1: torch.compile makes other gradients of it (torch 2.13); leave one out"
            )
        for key in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
            if getattr(model, key) % plan.tp_size:
                raise ValueError(
                    f"distributed.tp_size ({plan.tp_size}) does not divide model.{key} ({getattr(model, key)})"
                )
        if model.n_experts % plan.ep_size or (plan.ep_size > 1 and not model.n_experts):
            raise ValueError(
                f"distributed.ep_size ({plan.ep_size}) does not divide model.n_experts ({model.n_experts})"
            )
        if plan.ep_size > 1 and plan.activation_checkpointing == "selective":
            raise ValueError(
                "distributed.activation_checkpointing: selective and ep_size > 1 do not go together (torch 2.13 fails on "
                "FSDP's units inside of a block); choose full or none"
            )
        if plan.pp_size > model.n_layers:
            raise ValueError(f"distributed.pp_size ({plan.pp_size}) exceeds model.n_layers ({model.n_layers})")
        if model.n_experts and plan.tp_size > 1:
            raise ValueError("model.n_experts and distributed.tp_size: experts are split by ep_size, not by tp_size")
        parts = plan.tp_size * plan.cp_size * (2 if plan.cp_size > 1 else 1)
        if plan.model_parallel > 1 and length % parts:
            words = "2 * distributed.cp_size * tp_size" if plan.cp_size > 1 else "distributed.tp_size"
            raise ValueError(f"data.seq_len ({length}) is no multiple of {words} = {parts}")
        return self

    @model_validator(mode="after")
    def _nodes_fit(self) -> Self:
        most = self.elastic.max_nodes
        if most is not None and most < self.slurm.max_nodes:
            raise ValueError(f"elastic.max_nodes ({most}) is below slurm.nodes ({self.slurm.nodes})")
        return self

    @property
    def max_nodes(self) -> int:
        """The most nodes that the cluster may ever have."""
        return self.elastic.max_nodes or self.slurm.max_nodes


_CONTINUITY = (
    "trainer.function", "trainer.script", "model", "data.text", "data.prepared", "data.mixture", "data.seq_len", "data.val_fraction", "data.seed",
    "optimizer.name", "optimizer.ema", "step_scheduler.global_batch_size",
)  # fmt: skip


def continuation_differences(old: Config, new: Config) -> list[str]:
    """What in `new` a run begun with `old` cannot continue with, as `key: old → new` lines.

    Steps, learning rate, cadence and everything about the cluster may change; what gives the
    parameters their shape or the samples their order may not.
    """
    before, after = old.model_dump(), new.model_dump()
    lines = []
    for key in _CONTINUITY:
        was, now = before, after
        for part in key.split("."):
            was, now = was[part], now[part]
        if key == "step_scheduler.global_batch_size" and now is None:
            continue  # not written again: the run's own stays in force
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            lines += [f"{key}.{k}: {was[k]} → {now[k]}" for k in was if was[k] != now[k] and k != "size"]
        else:
            lines.append(f"{key}: {was} → {now}")
    return lines


def section_type(model: type[Section], name: str) -> type[Section] | None:
    """The model of a field that is a section, else None."""
    annotation = model.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


class Kind:
    """A field's type taken apart, for reading and for messages; `str()` says what it allows."""

    def __init__(self, annotation: Any, metadata: Sequence[Any] = ()) -> None:
        found = list(metadata)
        while get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            found += more
        origin, arguments = get_origin(annotation), get_args(annotation)
        union = origin in (Union, types.UnionType)
        self._metadata = [m for f in found for m in ([f, *f.metadata] if isinstance(f, FieldInfo) else [f])]
        self._base: Any = str if origin is Literal or annotation is SecretStr else origin or annotation
        self._arguments = arguments
        self._options = [Kind(a, found) for a in arguments] if union else [self]
        self.choices = [str(a) for a in arguments] if origin is Literal else []
        """The words of a Literal."""

    @classmethod
    def of(cls, model: type[Section], name: str) -> Self:
        field = model.model_fields[name]
        # examples are the one thing that pydantic keeps outside of metadata
        return cls(field.annotation, [*field.metadata, field])

    def takes(self, base: type) -> bool:
        """Whether values of exactly this Python type are among those allowed."""
        return any(option._base is base for option in self._options)

    def element(self, base: type) -> Kind:
        """The kind of a list's items or a mapping's values; itself, where it is neither."""
        return next((Kind(o._arguments[-1]) for o in self._options if o._base is base), self)

    def _limit(self, name: str) -> Any:
        return next((getattr(m, name) for m in self._metadata if getattr(m, name, None) is not None), None)

    def __str__(self) -> str:
        if len(self._options) > 1:
            return " or ".join(str(option) for option in self._options)
        if self.choices:
            return ("one of " if len(self.choices) > 1 else "") + ", ".join(self.choices)
        if self._base is list:
            low, high = self._limit("min_length"), self._limit("max_length")
            count = f"{low} " if low and low == high else "one or more " if low == 1 else ""
            return f"a list of {count}items, each {self.element(list)}"
        if self._base is dict:
            return f"a mapping of names to {self.element(dict)}"
        example = self._limit("examples")
        if self._base is str and example:
            return f"text such as {example[0]}"
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
                 type(None): "null", Any: "any value"}  # fmt: skip
        limits = (("ge", "of at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        bounds = [f"{text} {self._limit(n)}" for n, text in limits if self._limit(n) is not None]
        return f"{words.get(self._base, 'a section')} {' and '.join(bounds)}".strip()


def default_run_name(path: Path) -> str:
    """The file's stem; for a plain `train.yaml` or `config.yaml` the name of its folder."""
    stem = path.stem if path.stem not in {"train", "config", "cfg"} else path.resolve().parent.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "run"
