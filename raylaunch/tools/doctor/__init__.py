"""Before it starts: the state of the cluster and of its nodes (`raylaunch doctor`), and what `up` looks at on each node.

    login node   login  → Slurm, the state directory, this machine         ─┐
    nodes        collect submits node on each: facts, peers, GPUs, pairs    ├→ findings → people, or JSON
                 node ── measure (torch: the GPU, all-reduce of pairs)     ─┘

What is looked at (`facts`, `storage`, `gpus`, `measure`) is apart from what it means (`machine`, `site`, `fleet`, `pairs`),
which is pure. The findings name what is wrong and the next step; nothing here repairs anything.
"""
