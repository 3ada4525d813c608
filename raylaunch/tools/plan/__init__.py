"""What a run will need before it starts: memory per GPU, time, checkpoints. Arithmetic alone: no torch, no Ray."""
