"""The head: the one agent that leads the cluster.

head              the parts, the fence                 context   what the parts have in common
member_table      nodes, strikes, who is to leave      drivers   the processes of the present run
request_loop      what is asked of it                  run_queue run after run
node_duty         the node loop's turns
allocation_policy what to do when an allocation ends (pure)      ending    does it
"""

from raylaunch.cluster.head.head import HeadController

__all__ = ["HeadController"]
