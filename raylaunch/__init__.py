"""raylaunch keeps N Ray nodes alive on Slurm, and a training function alive on those nodes."""

__version__ = "0.1.0"
