"""Documents → tokens → Arrow shards, ready to be trained on. No torch, no Ray."""
