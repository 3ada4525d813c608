"""Sandboxes and clusters that several tests use one after the other.

A cluster is known by what it was asked to be (`Spec`): who asks for the same gets the same one. A test that breaks it
mends it (`Up.heal`). A test that fails leaves its sandbox dirty (conftest), and the next one gets a new sandbox.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from helpers import LIMIT, NOBODY, Done, Site, wait_for

from raylaunch.tools.sandbox import Sandbox
from raylaunch.tools.sandbox.spec import SandboxLayout
from raylaunch.tools.sandbox.teardown import leftovers

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Spec:
    """What a cluster is asked to be."""

    nodes: int
    config: str = ""
    """YAML."""
    options: tuple[str, ...] = ()
    """Of sbatch."""
    env: tuple[tuple[str, str], ...] = ()
    """Of the shell in which `raylaunch up` runs."""


@dataclass(frozen=True, eq=False)
class Up:
    """A cluster that is up: `main` of its site. Tests leave it as they found it."""

    site: Site
    spec: Spec
    said: Done
    """By `raylaunch up`."""

    @property
    def directory(self) -> Path:
        return self.site.cluster("main")

    def nodes(self) -> list[str]:
        """The nodes that are ready."""
        rows = self.site.members("main").values()
        return sorted(row["name"] for row in rows if row["state"] == "ready")

    def heal(self) -> None:
        """Mend what was done to nodes, and wait until the cluster is whole."""
        mend(self.site.sandbox)
        wait_for("the cluster is whole", lambda: len(self.nodes()) == self.spec.nodes, LIMIT, lambda: str(self.nodes()))


def mend(sandbox: Sandbox) -> None:
    """Start, thaw and reconnect the nodes of a sandbox."""
    for node in sandbox.status().nodes:
        if not node.running:
            sandbox.start(node.name)
            continue
        if node.frozen:
            sandbox.thaw(node.name)
        if node.cut:
            sandbox.heal(node.name)


@dataclass(eq=False)
class Ground:
    """A sandbox that is made when it is first asked for, and the clusters on it."""

    name: str
    sizes: Mapping[str, int]
    dirty: bool = False
    """A test has failed on it: whoever asks next gets a new one."""
    _sandbox: Sandbox | None = None
    _sites: list[Site] = field(default_factory=list)
    _clusters: dict[Spec, Up] = field(default_factory=dict)

    def sandbox(self) -> Sandbox:
        if self.dirty:
            self.close()
        if self._sandbox is None:
            self._sandbox = Sandbox.up(f"test-{os.getpid()}-{self.name}-{next(_numbers)}", **self.sizes)
        return self._sandbox

    def site(self, uid: int = 0, python: Path | None = None) -> Site:
        """A user's raylaunch with a state directory of its own."""
        made = Site.make(self.sandbox(), f"{'bob' if uid == NOBODY else 'alice'}-{next(_numbers)}", uid, python)
        self._sites.append(made)
        return made

    def cluster(self, spec: Spec) -> Up:
        """A cluster that is what `spec` says: the one that there is, else a new one."""
        self.sandbox()  # where the last one is dirty, its clusters go
        if spec not in self._clusters:
            self._clusters[spec] = self._up(spec)
        return self._clusters[spec]

    def _up(self, spec: Spec) -> Up:
        site = self.site()
        config = site.state / "home" / "main.yaml"
        config.write_text(spec.config)
        words = ["up", "-c", config, "--nodes", spec.nodes, "--", *spec.options]
        return Up(site, spec, site.run(*words, env=dict(spec.env)).expect(0))

    def close(self) -> None:
        """Take the sandbox down, with all that runs on it."""
        for site in self._sites:
            site.end_commands()
        self._sites.clear()
        self._clusters.clear()
        self.dirty = False
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.down()
            assert leftovers(SandboxLayout(sandbox.spec.name)) == []


SECRET = "correct-horse-battery-staple"

MAIN = Spec(
    nodes=3,
    config="""
slurm: {cpus_per_task: 2, mem: 3G, comment: "two words", env: {OUR_KEY: "${OUR_SECRET}"}}
elastic: {replace: false, max_requeues: 0}
""",
    options=("--nice=7",),
    env=(("OUR_SECRET", SECRET),),
)
"""The cluster of the tests that only look, and train."""
