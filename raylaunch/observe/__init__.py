"""Looking at what a run did: its time, its faults, its curve. Reads files, changes nothing."""
