"""What runs on a device. Knows algorithms, not the server."""

from .app import Client, make_client_app
from .trainer import Trainer

__all__ = ["Client", "Trainer", "make_client_app"]
