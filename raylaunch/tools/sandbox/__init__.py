"""A real Slurm cluster on one machine: the ground that raylaunch is tried and tested on.

`Sandbox` is all of it; `raylaunch sandbox …` is the same by hand. Standard library only.
"""

from raylaunch.tools.sandbox.paths import DEFAULT_NAME
from raylaunch.tools.sandbox.sandbox import NodeStatus, Sandbox, Status, missing, take_down

__all__ = ["DEFAULT_NAME", "NodeStatus", "Sandbox", "Status", "missing", "take_down"]
