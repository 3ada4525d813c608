"""A real Slurm cluster on one machine: the ground that raylaunch is tried and tested on.

`Sandbox` is all of it; `raylaunch sandbox …` is the same by hand. Standard library only.
"""

from raylaunch.tools.sandbox.sandbox import NodeStatus, Sandbox, Status, missing, take_down
from raylaunch.tools.sandbox.spec import DEFAULT_NAME

__all__ = ["DEFAULT_NAME", "NodeStatus", "Sandbox", "Status", "missing", "take_down"]
