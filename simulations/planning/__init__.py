"""What a training step would need, for every rule, before anything runs."""
