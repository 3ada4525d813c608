"""Before it starts: the state of the cluster and of its nodes (`raylaunch doctor`).

    login node   login_check → Slurm, the state directory, this machine           ─┐
    nodes        run_checks submits node_check: facts, clock, GPUs, pairs of nodes  ├→ findings → people, or JSON
                 node_check ── benchmarks (torch: the GPU, all-reduce of pairs)    ─┘

What is looked at (`machine_facts`, `storage_check`, `gpu_status`, `benchmarks`) is apart from what it means (`machine_checks`,
`slurm_checks`, `compare_nodes`, `pairwise`), which is pure. The findings name what is wrong and the next step; nothing here repairs anything.
"""
