"""Protects the HTTP server that llama.cpp always opens on a port of loopback."""

from __future__ import annotations

from typing import Any


def require_key(params: Any, key: str) -> None:
    """Makes llama.cpp's server reject requests without `key`, and requests of any web page; changes `params`.

    Its slots, properties, metrics and own page are switched off.

    Args:
        params: of xllamacpp.
        key: that requests must bear.
    """
    params.api_keys = [key]
    # llama.cpp grants every origin; the name of a host that cannot exist (RFC 2606) grants none. "null" would not do:
    # it is the origin of pages in a sandbox.
    params.cors_origins, params.cors_credentials = "http://nobody.invalid", False
    params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = params.ui = False
