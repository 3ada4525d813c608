"""Telling people what happens to a run.

rows of its files → `alert_rules` (pure) → `rate_limit` → `sender`, a process beside the driver → `alert_sinks`
"""
