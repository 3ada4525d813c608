"""What happened, from the files: a run's timeline, recoveries and goodput; node-hours and the audit log."""
