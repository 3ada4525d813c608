"""Slurm: `batch_script` renders what is submitted, `client` calls Slurm's commands, `parse` reads their answers."""
