"""What runs in the middle. Knows algorithms, not the client."""
