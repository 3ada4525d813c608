"""Health checks of the cluster and of its nodes (`raylaunch doctor`).

    login node   login_check → Slurm, the state directory, this machine           ─┐
    nodes        run_checks submits node_check: facts, clock, GPUs, pairs of nodes  ├→ findings → report, or JSON
                 node_check ── benchmarks (torch: the GPU, all-reduce of pairs)    ─┘

Collecting data (`machine_facts`, `storage_check`, `gpu_status`, `benchmarks`) is separate from judging it
(`machine_checks`, `slurm_checks`, `compare_nodes`, `pairwise`), which is pure. Findings state the problem and the next
step; nothing is repaired.
"""
