"""Existing sbatch scripts and torchrun commands → a raylaunch config. Text in, values and notes out; no I/O."""
