"""The live view of a cluster and its run: what the files say now, and how that looks on a terminal."""
