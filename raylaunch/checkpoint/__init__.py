"""Checkpoints on shared storage: `store` says what counts as one (no torch), `dcp` writes and reads them."""
