"""The baselines a user compares with."""
