"""What runs in a training worker, around the trainer's own function."""
