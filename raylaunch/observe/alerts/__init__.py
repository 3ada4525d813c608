"""Notifications about runs.

rows of its files → `alert_rules` (pure) → `rate_limit` → `sender`, a process next to the driver → `alert_sinks`
"""
