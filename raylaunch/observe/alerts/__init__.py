"""Telling people what happens to a run.

rows of its files → `rules` (pure) → `rate_limit` → `sidecar`, a process beside the driver → `sinks`
"""
