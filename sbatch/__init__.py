"""The batch scripts' templates; `raylaunch.slurm.script` renders them. Kept beside the package so
that they are read, and found, as files."""
