"""Forwards a run's metrics to experiment trackers."""
