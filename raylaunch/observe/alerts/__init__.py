"""Telling people what happens to a run.

rows of its files → `rules` (pure) → `limits` → `follow`, a process beside the driver → `sinks`
"""
