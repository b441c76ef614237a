"""What the way to the edge server costs: seconds and joules of a request over a radio link. All of it is reckoned.

One request and its answer over a connection that is open already, a packet holding `PACKET_BYTES`:

- transfer: a round trip + bytes ÷ rate, up and down + the resends × `resend_s`. Each packet is sent until it arrives,
  so `loss` ÷ (1 − `loss`) resends are expected of each;
- a resend is begun after two round trips without an answer (the tail loss probe of RFC 8985; a request has too few
  packets for duplicate acknowledgements to tell sooner), but not before `LEAST_RESEND_S`, Linux's least timeout;
- radio: joules a byte × bytes + active watts × (transfer + the server's seconds) + tail watts × tail (the power model
  of Huang et al., MobiSys 2012). A resend costs time, its bytes are not counted again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lilliput.config import LinkConfig

PACKET_BYTES = 1460
LEAST_RESEND_S = 0.2


@dataclass(frozen=True)
class Request:
    """One request to the edge server.

    Attributes:
        up_bytes: of the request's body.
        down_bytes: of the answer's.
        server_s: from the request's arrival to its answer.
    """

    up_bytes: int
    down_bytes: int
    server_s: float

    @property
    def packets(self) -> int:
        """Of both directions."""
        return sum(math.ceil(count / PACKET_BYTES) for count in (self.up_bytes, self.down_bytes))


def expected_resends(request: Request, link: LinkConfig) -> float:
    """How many packets of `request` have to be sent again, on average."""
    return request.packets * link.loss / (1.0 - link.loss)


def resend_s(link: LinkConfig) -> float:
    """What it takes to notice that a packet is lost."""
    return max(LEAST_RESEND_S, 2.0 * link.round_trip_ms / 1e3)


def transfer_s(request: Request, link: LinkConfig, resends: float | None = None) -> float:
    """Seconds on the way, both ways together; with the expected resends if none are given."""
    again = expected_resends(request, link) if resends is None else resends
    sending_s = 8e-6 * (request.up_bytes / link.up_mbit_per_s + request.down_bytes / link.down_mbit_per_s)
    return link.round_trip_ms / 1e3 + sending_s + again * resend_s(link)


def latency_s(request: Request, link: LinkConfig, resends: float | None = None) -> float:
    """From sending `request` to holding its answer."""
    return transfer_s(request, link, resends) + request.server_s


def active_j(request: Request, link: LinkConfig, resends: float | None = None) -> float:
    """What the device's radio draws for `request` until the answer is there, waiting for the server included."""
    sent_j = request.up_bytes * link.up_j_per_byte + request.down_bytes * link.down_j_per_byte
    return sent_j + link.active_watts * latency_s(request, link, resends)


def tail_j(link: LinkConfig, until_next_s: float = math.inf) -> float:
    """What it draws afterwards; a next request that comes before the tail's end cuts it short."""
    return link.tail_watts * min(link.tail_s, until_next_s)


def radio_j(request: Request, link: LinkConfig) -> float:
    """What a request that stands alone costs the device: its expected active joules, and a whole tail."""
    return active_j(request, link) + tail_j(link)


def battery_percent(energy_j: float, battery_wh: float) -> float:
    """What share of a full battery `energy_j` is, in percent."""
    return 100.0 * energy_j / (battery_wh * 3600.0)
