"""Who belongs to a cluster, and who leads it: the connection between agents, and elections."""
