"""A run's metrics, passed on to the experiment trackers that people use."""
