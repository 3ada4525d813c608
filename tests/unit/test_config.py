"""Reading configuration: layers, places in messages, YAML's traps, and `dump` as the inverse of `load`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylaunch.config import loader
from raylaunch.config.schema import (
    SIZES,
    Config,
    ElasticConfig,
    FieldType,
    JoinConfig,
    Section,
    continuation_differences,
    section_type,
)
from raylaunch.errors import ConfigError, UsageError


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name files: short relative ones. And no user's own file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SET", "from-env")
    monkeypatch.delenv("UNSET", raising=False)


def load(text: str | bytes, *sets: str, **overrides: Any) -> Config:
    Path("c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return loader.load(Path("c.yaml"), sets, overrides)


def errors(text: str | bytes, *sets: str, overrides: dict[str, Any] | None = None) -> list[str]:
    """The lines of the ConfigError that loading raises, without its hint."""
    with pytest.raises(ConfigError) as caught:
        load(text, *sets, **(overrides or {}))
    lines = caught.value.message.split("\n  ")
    return lines[1:] if len(lines) > 1 else lines


BAD: list[tuple[str, str]] = [
    # unknown keys
    ("slurm:\n  partion: x", "c.yaml:2: slurm.partion: unknown key; did you mean partition?"),
    ("slurm:\n  ntasks-per-node: 2", "c.yaml:2: slurm.ntasks-per-node: unknown key; did you mean ntasks_per_node?"),
    ("slrum: {}", "c.yaml:1: slrum: unknown key; did you mean slurm?"),
    ("nodes: 4", "c.yaml:1: nodes: unknown key; did you mean slurm.nodes?"),
    ("model:\n  max_steps: 4", "c.yaml:2: model.max_steps: unknown key; did you mean step_scheduler.max_steps?"),
    ("slurm.nodes: 4", "c.yaml:1: slurm.nodes: keys are nested in a file: write 'nodes:' under 'slurm:'"),
    ("elastic:\n  zzz: 4", "c.yaml:2: elastic.zzz: unknown key; elastic has " + ", ".join(ElasticConfig.model_fields)),
    ("elastic:\n  max_pending: 4", "c.yaml:2: elastic.max_pending: unknown key; did you mean elastic.join.max_pending?"),
    ("elastic:\n  join:\n    partion: x", "c.yaml:3: elastic.join.partion: unknown key; did you mean partition?"),
    ("elastic:\n  join:\n    time: 1\n    max_pending: 0",
     "c.yaml:4: elastic.join.max_pending: must be a whole number of at least 1, got 0"),
    ("elastic:\n  join: 5", "c.yaml:2: elastic.join: must be a section with keys under it, got 5"),
    ("elastic:\n  join.qos: x", "c.yaml:2: elastic.join.qos: keys are nested in a file: write 'qos:' under 'join:'"),
    ("1: 2", "c.yaml:1: 1: unknown key; the file has " + ", ".join(Config.model_fields)),
    ("slurm: {}\n<<: {}", "c.yaml:2: <<: unknown key; the file has " + ", ".join(Config.model_fields)),
    # wrong types
    ("elastic: 5", "c.yaml:1: elastic: must be a section with keys under it, got 5"),
    ("slurm:\n- a", "c.yaml:1: slurm: must be a section with keys under it, got a list"),
    ("slurm: {exclusive: yes}", "c.yaml:1: slurm.exclusive: must be true or false, got yes; write true"),
    ("slurm: {exclusive: 0}", "c.yaml:1: slurm.exclusive: must be true or false, got 0; write false"),
    ("slurm: {mem: [3]}", "c.yaml:1: slurm.mem: must be text or a whole number of at least 1 or null, got a list"),
    ("slurm: {modules: cuda}", "c.yaml:1: slurm.modules: must be a list of items, each text, got cuda; write [cuda]"),
    ("slurm: {modules: [a, [b]]}", "c.yaml:1: slurm.modules[1]: must be text, got a list"),
    ("slurm: {modules: [a, ]\n  , setup: [a, null]}", "c.yaml:2: slurm.setup[1]: must be text, got nothing"),
    ("slurm: {env: {A: [s3cret]}}", "c.yaml:1: slurm.env.A: must be text, got a list"),
    ("slurm: {env: {A: }}", "c.yaml:1: slurm.env.A: must be text, got nothing"),
    ("slurm: {env: [A=1]}", "c.yaml:1: slurm.env: must be a mapping of names to text, got a list"),
    ("step_scheduler: {max_steps: 1e6}",
     "c.yaml:1: step_scheduler.max_steps: must be a whole number of at least 1, got 1e6; write 1000000"),
    ('step_scheduler: {max_steps: "5"}',
     "c.yaml:1: step_scheduler.max_steps: must be a whole number of at least 1, got '5'"),
    ("step_scheduler: {max_steps: true}",
     "c.yaml:1: step_scheduler.max_steps: must be a whole number of at least 1, got true"),
    ("step_scheduler: {max_steps: }",
     "c.yaml:1: step_scheduler.max_steps: must be a whole number of at least 1, got nothing"),
    ("optimizer: {lr: fast}", "c.yaml:1: optimizer.lr: must be a number above 0, got fast"),
    ("optimizer: {lr: 1:30}", "c.yaml:1: optimizer.lr: must be a number above 0, got 1:30"),
    # impossible values
    ("optimizer:\n  lr: -1e-3", "c.yaml:2: optimizer.lr: must be a number above 0, got -1e-3"),
    ("optimizer: {lr: .nan}", "c.yaml:1: optimizer.lr: must be a number above 0, got .nan"),
    ("optimizer: {lr: 1e999}", "c.yaml:1: optimizer.lr: must be a number above 0, got 1e999"),
    ("optimizer:\n  betas:\n  - 0.9\n  - 1.5",
     "c.yaml:4: optimizer.betas[1]: must be a number of at least 0 and below 1, got 1.5"),
    ("optimizer: {betas: [0.9]}", "c.yaml:1: optimizer.betas: must be a list of 2 items, each a number of at least 0 "
     "and below 1, got a list"),
    ("data: {text: []}", "c.yaml:1: data.text: must be a list of one or more items, each text, got an empty list"),
    ("data: {text: }", "c.yaml:1: data.text: must be a list of one or more items, each text, got nothing"),
    ("cluster: {backend: slrum}",
     "c.yaml:1: cluster.backend: must be one of auto, slurm, local, got slrum; did you mean slurm?"),
    ("distributed: {strategy: zero}", "c.yaml:1: distributed.strategy: must be one of ddp, fsdp, hsdp, got zero"),
    ("slurm: {nodes: 0}", "c.yaml:1: slurm.nodes: nodes must be at least 1, got 0"),
    ("slurm: {nodes: '8:2'}", "c.yaml:1: slurm.nodes: invalid range 8:2: the minimum exceeds the maximum, got '8:2'"),
    ("slurm: {nodes: 2.5}", "c.yaml:1: slurm.nodes: nodes is a number (4) or a range (2:8), got 2.5"),
    ("slurm: {nodes: true}", "c.yaml:1: slurm.nodes: nodes is a number (4) or a range (2:8), got true"),
    ("slurm: {time: 1h}", "c.yaml:1: slurm.time: time is minutes, minutes:seconds, hours:minutes:seconds or "
     "days-hours[:minutes[:seconds]], got 1h"),
    ("slurm: {signal: foo}", "c.yaml:1: slurm.signal: must be text such as B:USR1@120, got foo"),
    ("trainer: x", "c.yaml:1: trainer.function: must be text such as trainers.fsdp:train, got x"),
    ("slurm: {gpus_per_node: -1}",
     "c.yaml:1: slurm.gpus_per_node: must be text or a whole number of at least 0 or null, got -1"),
    ('slurm: {partition: "a\\nb"}', "c.yaml:1: slurm.partition: must be one line of text, not empty and without "
     "control characters, got 'a\\nb'"),
    ("slurm: {partition: ''}", "c.yaml:1: slurm.partition: must be one line of text, not empty and without control "
     "characters, got ''"),
    ("slurm: {env: {'A;rm': s3cret}}", "c.yaml:1: slurm.env.A;rm: a variable's name has letters, digits and '_', and "
     "starts with no digit"),
    ("cluster: {name: a/b}", "c.yaml:1: cluster.name: a name has 1 to 63 letters, digits, '.', '_' or '-', and starts "
     "with a letter or digit, got a/b"),
    # keys that do not go together
    ("model:\n  dim: 100\n  n_heads: 3", "c.yaml:3: model: dim (100) must be a multiple of n_heads (3)"),
    ("step_scheduler:\n  grad_acc_steps: 1\n  global_batch_size: 2",
     "c.yaml:3: step_scheduler: give grad_acc_steps or global_batch_size, not both"),
    ("step_scheduler:\n  warmup_steps: 9\n  max_steps: 5",
     "c.yaml:3: step_scheduler.warmup_steps (9) exceeds max_steps (5)"),
    # variables
    ("slurm:\n  account: ${UNSET}", "c.yaml:2: slurm.account: the environment variable UNSET is not set; "
     "for plain text write $${UNSET}"),
    ("slurm: {env: {A: '${UNSET}'}}", "c.yaml:1: slurm.env.A: the environment variable UNSET is not set; "
     "for plain text write $${UNSET}"),
    ("slurm: {account: 'a${SET:-x}'}",
     "c.yaml:1: slurm.account: only ${NAME} is understood, got ${SET:-x}; for plain text write $${"),
    ("slurm: {account: 'a${SET'}", "c.yaml:1: slurm.account: only ${NAME} is understood, got ${SET; "
     "for plain text write $${"),
    ("slurm:\n  nodes: ${SET}",
     "c.yaml:2: slurm.nodes: nodes is a number (4) or a range (2:8), got the value of ${SET}"),
    # YAML
    ("slurm:\n  nodes: 1\n  time: 5\n  nodes: 2", "c.yaml:4: nodes: written twice in one mapping; first at c.yaml:2"),
    ("slurm: {}\nslurm: {}", "c.yaml:2: slurm: written twice in one mapping; first at c.yaml:1"),
    ("? [a]\n: b", "c.yaml:1: a key must be a word, not a list or a mapping"),
    ("a: &x [*x]", "c.yaml:1: a: unknown key; the file has " + ", ".join(Config.model_fields)),
    ("slurm: {account: !env A}", "c.yaml:1: the tag !env is not supported"),
    ("slurm: {account: !!python/name:os.system A}", "c.yaml:1: the tag !!python/name:os.system is not supported"),
    ("data: {seed: " + "9" * 5000 + "}", "c.yaml:1: a number with more than 1000 digits"),
    ("- a", "c.yaml:1: the file must be a mapping of sections, got a list"),
    ("\n\nhello", "c.yaml:1: the file must be a mapping of sections, got hello"),
    ("slurm:\n\tnodes: 1", "c.yaml:2: not valid YAML: found character '\\t' that cannot start any token (while "
     "scanning for the next token)"),
    ("slurm:\n  nodes: [1", "c.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>' (while parsing a "
     "flow sequence)"),
    ("a: 1\n---\nb: 1", "c.yaml:2: not valid YAML: but found another document (expected a single document in the "
     "stream)"),
    ("a: *nope", "c.yaml:1: not valid YAML: found undefined alias 'nope'"),
    ("[" * 700, "c.yaml: nested too deeply"),
    ("slurm:\n  nodes: \x01", "c.yaml:2: not valid YAML: a control character, as in a binary file"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_bad_file(text: str, message: str) -> None:
    assert errors(text) == [message]


def test_not_utf8() -> None:
    assert errors(b"slurm:\n  account: \xff") == ["c.yaml:2: not UTF-8 text"]


def test_hint_for_variables_in_brackets() -> None:
    with pytest.raises(ConfigError) as caught:
        load("data:\n  text: [${SET}]")
    assert caught.value.hint == 'Inside {...} and [...] write "${NAME}" in quotes.'


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("d", "d: is a directory"),
        ("c.yml", "c.yml: no such file\n  Did you mean c.yaml?"),
        ("no/c.yml", "no/c.yml: no such file\n  The directory no does not exist either."),
        ("c.yaml/x", "c.yaml/x: cannot be read: Not a directory"),
        ("big", "big: larger than 1 MiB: not a configuration\n  Check the path."),
        ("nul\0", "nul\0: cannot be read: embedded null byte"),
    ],
)
def test_unreadable_file(name: str, message: str) -> None:
    Path("d").mkdir()
    Path("c.yaml").touch()
    Path("big").write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(ConfigError) as caught:
        loader.load(Path(name))
    assert str(caught.value).startswith(message)


def test_file_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> None:  # the tests may run as root, who may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ConfigError, match=r"^c.yaml: cannot be read: Permission denied"):
        loader.load(Path("c.yaml"))


@pytest.mark.parametrize(
    "text", ["", "\n", "# nothing\n", "---\n", "null", "{}", "slurm:\nmodel:\n", "model: null", "\ufeffslurm: {}"]
)
def test_empty_file_is_the_defaults(text: str) -> None:
    assert load(text) == Config() == loader.load(None)


def test_all_errors_at_once_in_the_order_of_layers_and_lines() -> None:
    lines = errors(
        "optimizer:\n  lr: 0\nslurm:\n  nodes: 0\n  env: {A: '${UNSET}', B: [1]}\n  zzzz: 1\n  nodes: 2",
        "model.dim=x",
        overrides={"cluster.name": "a b"},
    )
    assert [line.split(": ")[:2] for line in lines] == [
        ["c.yaml:2", "optimizer.lr"],
        ["c.yaml:4", "slurm.nodes"],
        ["c.yaml:5", "slurm.env.A"],
        ["c.yaml:5", "slurm.env.B"],
        ["c.yaml:6", "slurm.zzzz"],
        ["c.yaml:7", "nodes"],
        ["command line", "cluster.name"],
        ["--set model.dim=x", "must be a whole number of at least 1, got x"],
    ]


def test_a_wrong_key_does_not_make_others_wrong() -> None:
    """n_heads is left out as it is wrong; dim must not then be judged against the default."""
    assert errors("model: {dim: 65, n_heads: x}") == [
        "c.yaml:1: model.n_heads: must be a whole number of at least 1, got x"
    ]


# --- layers -------------------------------------------------------------------------------------


def user_file(text: str) -> None:
    Path("xdg/raylaunch").mkdir(parents=True)
    Path("xdg/raylaunch/config.yaml").write_text(text)


def test_layers_win_in_order() -> None:
    user_file("slurm: {account: user, partition: user, qos: user, comment: user}\nmodel: {size: tiny}")
    text = "slurm: {partition: file, qos: file, comment: file}"
    config = load(text, "slurm.comment=set", **{"slurm.qos": "flag", "slurm.comment": "flag", "slurm.mem": None})
    slurm = config.slurm
    assert (slurm.account, slurm.partition, slurm.qos, slurm.comment) == ("user", "file", "flag", "set")
    assert slurm.mem is None and config.model.dim == SIZES["tiny"]["dim"]


def test_the_last_set_wins_and_null_takes_back() -> None:
    assert load("slurm: {mem: 4G}", "slurm.mem=5", "slurm.mem=null").slurm.mem is None
    assert load("slurm: {mem: 4G}", "slurm.mem=").slurm.mem is None


def test_mappings_merge_and_lists_replace() -> None:
    user_file("slurm: {env: {A: 1, B: 1}, modules: [a, b]}")
    slurm = load("slurm: {env: {B: 2}, modules: [c]}", "slurm.env.C=3").slurm
    assert slurm.env == {"A": "1", "B": "2", "C": "3"} and slurm.modules == ["c"]
    assert load("slurm:\n  modules:\n  env:\n").slurm.modules == []


def test_the_layer_with_the_mistake_is_named() -> None:
    user_file("slurm:\n  nodes: 0\n")
    place = Path("xdg/raylaunch/config.yaml").absolute()
    assert errors("{}") == [f"{place}:2: slurm.nodes: nodes must be at least 1, got 0"]
    assert load("slurm: {nodes: 3}").slurm.nodes == "3"  # a value that is not used is not judged
    assert errors("slurm: {nodes: 3}", "slurm.nodes=4:2") == [
        "--set slurm.nodes=4:2: invalid range 4:2: the minimum exceeds the maximum, got 4:2"
    ]
    assert errors("slurm: {nodes: 3}", overrides={"slurm.nodes": "x"}) == [
        "command line: slurm.nodes: nodes is a number (4) or a range (2:8), got 'x'"
    ]


def test_a_clash_between_layers_blames_the_later() -> None:
    text = "step_scheduler: {grad_acc_steps: 2}"
    assert errors(text, "step_scheduler.global_batch_size=8") == [
        "--set step_scheduler.global_batch_size=8: step_scheduler: give grad_acc_steps or global_batch_size, not both"
    ]


def test_user_file_can_be_left_out_and_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    user_file("slurm: {nodes: 7}")
    assert loader.load(None).slurm.nodes == "7"
    assert loader.load(None, user_file=None).slurm.nodes == "1"
    assert loader.load(None, user_file=Path("nowhere")).slurm.nodes == "1"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("xdg").rename(".config")
    assert loader.load(None).slurm.nodes == "7"


def test_flags_as_python_values() -> None:
    config = loader.load(
        None,
        overrides={
            "slurm.nodes": 4,
            "slurm.exclusive": True,
            "slurm.account": 123,
            "slurm.extra": ("--a", "--b"),
            "slurm.modules": (),
            "slurm.env": {"A": "${UNSET}"},
            "slurm.comment": "${UNSET}",
            "slurm.setup": ["echo ${UNSET}"],
            "optimizer.lr": 1,
        },
    )
    assert (config.slurm.nodes, config.slurm.exclusive, config.slurm.account) == ("4", True, "123")
    assert config.slurm.extra == ["--a", "--b"] and config.slurm.modules == []
    # The shell has expanded what it wanted to: the rest is meant as it stands.
    assert config.slurm.comment == "${UNSET}" and config.slurm.setup == ["echo ${UNSET}"]
    assert config.slurm.env == {"A": "$${UNSET}"}
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slurm.nodes", "--set slurm.nodes: not of the form key=value"),
        ("=4", "--set =4: not of the form key=value"),
        ("slurm..nodes=4", "--set slurm..nodes=4: not of the form key=value"),
        ("slurm.modules=[a", "--set slurm.modules=[a: not valid YAML: expected ',' or ']'"),
        ("slurm.nods=4", "--set slurm.nods=4: unknown key; did you mean nodes?"),
        ("slurm=4", "--set slurm=4: must be a section with keys under it, got 4"),
        (
            "slurm.nodes.x=4",
            "--set slurm.nodes.x=4: slurm.nodes: nodes is a number (4) or a range (2:8), got a mapping",
        ),
        ("slurm.account=${UNSET}", "--set slurm.account=${UNSET}: the environment variable UNSET is not set"),
    ],
)
def test_bad_set(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        loader.load(None, [text])
    assert str(caught.value).startswith(message)


def test_sections_in_sections() -> None:
    config = load("elastic:\n  join:\n    partition: low\n    max_pending: 3\n", "elastic.join.qos=q")
    assert config.elastic.join == JoinConfig(partition="low", qos="q", max_pending=3)
    assert load("elastic: {join: }", "elastic.join.partition=x").elastic.join.partition == "x"
    with pytest.raises(
        UsageError, match=r"^--set elastic.join.max_pending=0: must be a whole number of at least 1, got 0$"
    ):
        load("", "elastic.join.max_pending=0")
    assert errors("slurm:\n  nodes: 4\nelastic:\n  join: {qos: x}\n  max_nodes: 3") == [
        "c.yaml:5: elastic.max_nodes (3) is below slurm.nodes (4)"
    ]


# --- YAML's traps -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: {lr: 1e-3}", "optimizer.lr", 1e-3),
        ("optimizer: {lr: 3E+2}", "optimizer.lr", 300.0),
        ("optimizer: {lr: .5}", "optimizer.lr", 0.5),
        ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
        ("optimizer: {max_grad_norm: ~}", "optimizer.max_grad_norm", None),
        ("step_scheduler: {max_steps: 10_000}", "step_scheduler.max_steps", 10_000),
        ("data: {seed: 0x10}", "data.seed", 16),
        ("data: {seed: 0o10}", "data.seed", 8),
        ("data: {seed: 010}", "data.seed", 10),
        ("slurm: {time: 1:30:00}", "slurm.time", "1:30:00"),
        ("slurm: {time: 90}", "slurm.time", "90"),
        ("slurm: {time: 1-12}", "slurm.time", "1-12"),
        ("slurm: {nodes: 2:8}", "slurm.nodes", "2:8"),
        ("slurm: {nodes: 2-8}", "slurm.nodes", "2:8"),
        ("slurm: {nodes: 4}", "slurm.nodes", "4"),
        ("slurm: {comment: 5}", "slurm.comment", "5"),
        ("slurm: {comment: 1e-3}", "slurm.comment", "1e-3"),
        ("slurm: {comment: yes}", "slurm.comment", "yes"),
        ("slurm: {comment: True}", "slurm.comment", "True"),
        ("slurm: {comment: 2024-01-01}", "slurm.comment", "2024-01-01"),
        ("slurm: {account: 0123}", "slurm.account", "0123"),
        ("slurm: {account: '123'}", "slurm.account", "123"),
        ("slurm: {account: null}", "slurm.account", None),
        ("slurm: {gpus_per_node: 4}", "slurm.gpus_per_node", 4),
        ("slurm: {gpus_per_node: a100:4}", "slurm.gpus_per_node", "a100:4"),
        ("slurm: {mem: 16G}", "slurm.mem", "16G"),
        (
            "slurm: {env: {X: 1, Y: 1.50, Z: true, E: ''}}",
            "slurm.env",
            {"X": "1", "Y": "1.50", "Z": "true", "E": ""},
        ),
        ("slurm: {modules: [cuda/12.4, 3]}", "slurm.modules", ["cuda/12.4", "3"]),
        ("slurm: {exclusive: TRUE}", "slurm.exclusive", True),
        ("slurm: {account: !!str 5}", "slurm.account", "5"),
        ("model: &m {size: tiny}\n", "model.dim", 64),
        ("step_scheduler: {max_steps: 5}", "step_scheduler.warmup_steps", 5),
        ("step_scheduler: {max_steps: 50}", "step_scheduler.warmup_steps", 10),
        # variables
        ("slurm:\n  account: a-${SET}-${SET}", "slurm.account", "a-from-env-from-env"),
        ("slurm:\n  account: a-$${SET}", "slurm.account", "a-${SET}"),
        ("slurm:\n  account: $$${SET}", "slurm.account", "$${SET}"),
        ("slurm:\n  account: $SET$", "slurm.account", "$SET$"),
        ("slurm:\n  env:\n    T: a-${SET}\n", "slurm.env", {"T": "a-${SET}"}),
        ("slurm:\n  env:\n    T: $${X}\n", "slurm.env", {"T": "$${X}"}),
        ("slurm:\n  setup:\n  - echo ${UNSET:-5} $${X}\n", "slurm.setup", ["echo ${UNSET:-5} $${X}"]),
        ("step_scheduler:\n  max_steps: ${NUMBER}", "step_scheduler.max_steps", 12),
        ("optimizer:\n  max_grad_norm: ${EMPTY}", "optimizer.max_grad_norm", None),
    ],
)
def test_value(text: str, key: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBER", "12")
    monkeypatch.setenv("EMPTY", "")
    section, name = key.split(".")
    got = getattr(getattr(load(text), section), name)
    assert got == value and type(got) is type(value)


def test_a_secret_is_neither_shown_nor_kept() -> None:
    with pytest.raises(ConfigError) as caught:
        load("slurm: {env: {A: [s3cret], B-: s3cret}}\nmodel:\n  dim: ${SET}")
    assert "s3cret" not in str(caught.value) and "from-env" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^--set slurm.env.A=\.\.\.: must be text, got a list$"):
        load("", "slurm.env.A=[s3cret]")
    assert "from-env" not in loader.dump(load("slurm: {env: {A: '${SET}'}, setup: ['x ${SET}']}"))


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("plain", "plain"),
        ("a b", "'a b'"),
        ("", "''"),
        ("${KEY}", '"${KEY}"'),
        ("a b${KEY}c;", "'a b'\"${KEY}\"'c;'"),
        ("$${KEY}", "'${''KEY}'"),
        ("`id` $(id) $HOME '", """'`id` $(id) $HOME '"'"''"""),
    ],
)
def test_shell_word(value: str, word: str) -> None:
    assert loader.shell_word(value) == word
    expected = value.replace("$${", "\0").replace("${KEY}", "x y").replace("\0", "${")
    script = f"KEY='x y'; printf %s {word}"
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == expected


# --- dump ---------------------------------------------------------------------------------------

TRAPS = st.sampled_from(
    ["yes", "null", "~", "1e-3", "0x1F", "0o17", "017", "1:30:00", "2024-01-01", ".inf", "=", "<<", "- a", "a: b",
     "#x", "${SET}", "$${SET}", "$$${", "${", "@x", "`x`", "%x", "!x", "&x", "*x", "?", "|", ">", "'", '"', "\\", "ü"]
)  # fmt: skip
LINES = TRAPS | st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)
TEXTS = TRAPS | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
NAMES = st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_]{0,8}\Z")


@st.composite
def configs(draw: st.DrawFn) -> Config:
    maybe = st.none() | LINES
    slurm = {
        **{key: draw(maybe) for key in ("job_name", "account", "partition", "constraint", "comment", "mem")},
        "gpus_per_node": draw(st.none() | LINES | st.integers(0, 8)),
        "nodes": draw(st.sampled_from(["1", "2:8"])),
        "time": draw(st.sampled_from([None, "30", "1:30:00", "2-00"])),
        "env": draw(st.dictionaries(NAMES, TEXTS, max_size=3)),
        "setup": draw(st.lists(TEXTS, max_size=3)),
        "extra": draw(st.lists(LINES, max_size=3)),
        "exclusive": draw(st.booleans()),
    }
    numbers = st.floats(1e-300, 1e300)
    optimizer = {"lr": draw(numbers), "eps": draw(numbers), "max_grad_norm": draw(st.none() | numbers)}
    model = {"size": draw(st.sampled_from(list(SIZES)))}
    return Config.model_validate(
        {
            "slurm": slurm,
            "optimizer": optimizer,
            "model": model,
            "data": {"text": draw(st.lists(TEXTS, min_size=1))},
        }
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs())
def test_dump_is_the_inverse_of_load(config: Config) -> None:
    Path("resolved.yaml").write_text(loader.dump(config), encoding="utf-8")
    assert loader.load_resolved(Path("resolved.yaml")) == config
    # Any YAML reader agrees on what is text, and no value is cut in two by a folded line.
    plain = yaml.safe_load(Path("resolved.yaml").read_text(encoding="utf-8"))
    assert plain["slurm"]["setup"] == config.slurm.setup and plain["slurm"]["env"] == config.slurm.env


def test_dump_is_complete_in_order_and_free_of_the_user_file() -> None:
    text = loader.dump(load("slurm:\n  account: $${SET}\n  env: {T: '${SET}'}"))
    assert list(yaml.safe_load(text)) == list(Config.model_fields)
    assert list(yaml.safe_load(text)["slurm"]) == list(type(Config().slurm).model_fields)
    user_file("slurm: {nodes: 9}")
    Path("resolved.yaml").write_text(text)
    assert loader.load_resolved(Path("resolved.yaml")).slurm.nodes == "1"
    # Every value is written out, so as a plain file too it stands above the user's own.
    assert loader.load(Path("resolved.yaml")).slurm.account == "${SET}"


def test_resolved_file_loads_where_its_secrets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("resolved.yaml").write_text(loader.dump(load("slurm: {env: {T: '${SET}'}}")))
    monkeypatch.delenv("SET")
    assert loader.load_resolved(Path("resolved.yaml")).slurm.env == {"T": "${SET}"}
    with pytest.raises(ConfigError, match="SET is not set"):
        loader.load(Path("resolved.yaml"))


SNIPPETS = st.sampled_from(
    [
        "slurm",
        "env",
        "nodes",
        "model",
        "optimizer",
        "betas",
        "step_scheduler",
        "data",
        "text",
        "A",
        ": ",
        ":\n ",
        "\n",
        "\n  ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "&a",
        "*a",
        "!!int ",
        "!x ",
        "? ",
        "|\n",
        "'",
        '"',
        "#",
        "1",
        "-1",
        "1e-3",
        ".nan",
        "9" * 5000,
        "null",
        "true",
        "${SET}",
        "${UNSET}",
        "$${",
        "${",
        "\t",
        "\0",
        "ü",
        "<<",
        "---\n",
        "%",
    ]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SNIPPETS, max_size=12).map("".join))
def test_whatever_is_written_is_a_config_or_an_explained_error(text: str) -> None:
    for sets in ([], [text], [f"slurm.env={text}"], [f"slurm.{text}=1"]):
        try:
            assert isinstance(load(text, *sets), Config)
        except UsageError as error:
            assert error.message and len(error.message) < 20_000


# --- the schema ---------------------------------------------------------------------------------


def fields(model: type[Section] = Config, path: str = "") -> list[tuple[type[Section], str, str]]:
    found = []
    for name in model.model_fields:
        inner = section_type(model, name)
        found += fields(inner, f"{path}{name}.") if inner else [(model, name, f"{path}{name}")]
    return found


@pytest.mark.parametrize(("model", "name", "key"), fields(), ids=[f[2] for f in fields()])
def test_every_field_can_say_what_it_allows(model: type[Section], name: str, key: str) -> None:
    words = str(FieldType.of(model, name))
    assert words and "typing" not in words and "<" not in words and "a section" not in words
    wrong = "{a: {b: [1]}}" if key != "model.kwargs" else "3"  # whose values may be anything
    line = errors("{}", f"{key}={wrong}")
    assert len(line) == 1 and key in line[0]


def test_what_torch_computes_otherwise_is_refused() -> None:
    (line,) = errors("distributed: {compile: true, tp_size: 2}")
    assert "compile and tp_size > 1" in line
    experts = "model: {n_experts: 4}\ndistributed: {ep_size: 2, activation_checkpointing: selective}"
    (line,) = errors(experts)
    assert "choose full or none" in line


def test_the_other_keys_of_a_model_of_ones_own_are_its_arguments() -> None:
    text = "model: {_target_: mine.models.Small, width: 3, n_layers: 2, inner: {deep: [1, a]}}"
    model = load(text, "model.width=4", "model.vocab_size=512").model
    assert model.target == "mine.models.Small" and model.vocab_size == 512
    assert model.kwargs == {"width": 4, "n_layers": 2, "inner": {"deep": [1, "a"]}, "vocab_size": 512}
    assert load(loader.dump(load(text))).model == load(text).model
    assert "hf and _target_" in errors("model: {target: 'a:b', hf: x}")[0]
    assert "text such as package.module:function" in errors("model: {_target_: nothing}")[0]
    assert "tp_size" in errors("model: {_target_: 'a:b'}", "distributed.tp_size=2")[0]


def test_continuation_differences() -> None:
    old, new = (
        load("model: {size: tiny}\noptimizer: {lr: 1e-3}"),
        load("model: {size: 1M}\noptimizer: {lr: 1e-4}"),
    )
    assert continuation_differences(old, old) == []
    assert "model.dim: 64 → 128" in continuation_differences(old, new)
    assert not any("optimizer" in line for line in continuation_differences(old, new))


def test_loading_needs_none_of_the_heavy_libraries() -> None:
    code = "import sys, raylaunch.config.loader; sys.exit(bool({'ray', 'torch', 'pyarrow'} & set(sys.modules)))"
    root = Path(loader.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
