"""Radio links for tests."""

from lilliput.config import LinkConfig


def link(**changes):
    """A link of 8 Mbit/s and 10 ms without losses, with a tail of 0.2 s, except for `changes`."""
    settings = {
        "up_mbit_per_s": 8.0,
        "down_mbit_per_s": 8.0,
        "round_trip_ms": 10.0,
        "loss": 0.0,
        "up_j_per_byte": 1e-6,
        "down_j_per_byte": 1e-6,
        "active_watts": 0.5,
        "tail_s": 0.2,
        "tail_watts": 0.1,
    }
    return LinkConfig(**settings | changes)
