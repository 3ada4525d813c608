"""The typed configuration: one model per section of the YAML file.

Strict: an unknown key, a wrong type or an impossible value is an error. Reading files, layering
and line numbers are in `configfile`; this module is the schema and what follows from it.
"""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
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


Name = Annotated[str, AfterValidator(check_name)]
Line = Annotated[str, AfterValidator(check_line)]
Environment = dict[
    Annotated[str, AfterValidator(check_variable)], Annotated[str, AfterValidator(check_environment_value)]
]
Nodes = Annotated[str, BeforeValidator(parse_nodes)]
SlurmTime = Annotated[str, BeforeValidator(parse_time)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """What all sections share: unknown keys refused, values immutable, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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


class ElasticConfig(Section):
    """`elastic:` how long to go on, and with how few."""

    min_nodes: Positive | None = None
    """A run holds below this many nodes.
    Default: the lower end of slurm.nodes for bring-up, 1 in training."""
    max_same_error: Positive = 2
    """The same error this often with no commit between ends the run."""
    backoff: Annotated[float, Field(ge=0, le=600)] = 1.0
    """Seconds before the second attempt without progress; doubles, at most 60."""
    hold_timeout: Positive = 1800
    """Seconds that a run waits below its minimum of nodes before it gives up, saved."""


SIZES: dict[str, dict[str, int]] = {
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 192},
    "1M": {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 384},
    "10M": {"dim": 320, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 864},
    "125M": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "ffn_dim": 2048},
    "1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 8192},
    "8B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 14336},
}


class ModelConfig(Section):
    """`model:` a Llama-style decoder; `size` names a shape, the other keys override it."""

    size: Literal["tiny", "1M", "10M", "125M", "1B", "8B"] = "1M"
    dim: Positive = 128
    n_layers: Positive = 4
    n_heads: Positive = 4
    n_kv_heads: Positive = 2
    ffn_dim: Positive = 384
    vocab_size: Annotated[int, Field(ge=257)] = 264
    """Bytes and one separator are 257; 264 divides by eight."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0

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
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        return self


class DataConfig(Section):
    """`data:` text, byte by byte."""

    text: list[str] = Field(default_factory=lambda: ["stdlib:"], min_length=1)
    """Files, directories, globs, or `stdlib:` for Python's own library source."""
    seq_len: Annotated[int, Field(ge=2)] = 256
    val_fraction: Share = 0.01
    seed: NotNegative = 0


class OptimizerConfig(Section):
    """`optimizer:`."""

    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0


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
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The cosine ends at this share of lr."""

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

    strategy: Literal["fsdp"] = "fsdp"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; auto: bfloat16 on GPU, float32 on CPU. Parameters are kept in float32."""
    compile: bool = False
    comm_timeout: Positive = 600
    """Seconds after which a collective that does not complete is an error."""


class CheckpointConfig(Section):
    """`checkpoint:`."""

    checkpoint_dir: str | None = None
    """Shared by all nodes. Default: `checkpoints` in the run directory."""
    keep_last_n_checkpoints: Positive = 2
    async_save: bool = False


class LoggingConfig(Section):
    """`logging:`."""

    log_every_steps: Positive = 1
    """Steps between two lines of metrics.jsonl; the last step always has one."""


class Config(Section):
    """The whole file."""

    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    trainer: Annotated[str, Field(pattern=r"^[\w.]+:\w+$", examples=["trainers.fsdp:train"])] = "trainers.fsdp:train"
    """The function `(config, session)` that each worker runs."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    step_scheduler: StepSchedulerConfig = Field(default_factory=StepSchedulerConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        steps = self.step_scheduler
        if steps.warmup_steps > steps.max_steps:
            raise ValueError(
                f"step_scheduler.warmup_steps ({steps.warmup_steps}) exceeds max_steps ({steps.max_steps})"
            )
        return self


_CONTINUITY = (
    "trainer", "model", "data.text", "data.seq_len", "data.val_fraction", "data.seed",
    "optimizer.name", "step_scheduler.global_batch_size",
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
        self._base: Any = str if origin is Literal else origin or annotation
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
        example = self._limit("examples")
        if self._base is str and example:
            return f"text such as {example[0]}"
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
                 type(None): "null", dict: "a mapping of names to text"}  # fmt: skip
        limits = (("ge", "of at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        bounds = [f"{text} {self._limit(n)}" for n, text in limits if self._limit(n) is not None]
        return f"{words.get(self._base, 'a section')} {' and '.join(bounds)}".strip()


def default_run_name(path: Path) -> str:
    """The file's stem; for a plain `train.yaml` or `config.yaml` the name of its folder."""
    stem = path.stem if path.stem not in {"train", "config", "cfg"} else path.resolve().parent.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "run"
