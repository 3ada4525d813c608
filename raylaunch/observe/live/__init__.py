"""The live view of a cluster and its run: the current state from the files, and its display in a terminal."""
