"""Checkpoints on shared storage: `store` says what counts as one (no torch), `saver` writes and reads them."""
