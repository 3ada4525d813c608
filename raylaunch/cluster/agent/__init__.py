"""The process on each node: it starts Ray there, keeps it alive, and follows the head or becomes it."""
