"""Slurm, or processes on this machine in its place: the only room that submits, asks for or cancels jobs."""
