"""Slurm, or processes on this machine in its place: the only package that submits, queries or cancels jobs."""
