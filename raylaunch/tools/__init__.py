"""Before a run and around it: memory and time (`plan`), health checks (`doctor`), faults (`chaos`), a Slurm cluster on
this machine (`sandbox`)."""
