"""Only losses are compared: answers are scalars."""
