"""The error stays inside a block."""
