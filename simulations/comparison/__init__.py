"""The same federated experiment for several rules: accuracy beside memory, bytes and compute."""
