"""One file a paper: its claim, our measurement, and the command that prints it."""
