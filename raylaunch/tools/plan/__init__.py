"""Estimate memory per GPU, time and checkpoints of a run. Pure arithmetic, without torch and Ray."""
