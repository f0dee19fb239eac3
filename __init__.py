"""FedForward: federated edge learning without backpropagation.

The map of the house (arrows point down only: simulations → server, client → algorithms):

    algorithms/    how a network learns; pure PyTorch
    client/        what runs on a device
    server/        what runs in the middle
    simulations/   a world to run it in: experiments, data, engines, reports, the command line
    protocol.py    the messages that cross the wire, scalar_wire.py those of scalars, message_bytes.py what they weigh
"""

__version__ = "0.1.0"
