"""What a cluster and its run do, for Prometheus: read from the cluster's and the run's files, served on the head."""
