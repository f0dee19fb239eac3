"""The error travels through random matrices."""
