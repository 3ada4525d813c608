"""Metrics of a cluster and its run for Prometheus: read from their files, served on the head."""
