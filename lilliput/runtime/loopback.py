"""Protects the HTTP server that llama.cpp always opens on a loopback port."""

from __future__ import annotations

from typing import Any


def require_key(params: Any, key: str) -> None:
    """Makes llama.cpp's server reject requests without `key` and requests from web pages; changes `params` in place.

    Switches off its slots, properties, metrics and web page.

    Args:
        params: xllamacpp's CommonParams.
        key: the API key that requests must have.
    """
    params.api_keys = [key]
    # llama.cpp allows every origin by default. A host name that cannot exist (RFC 2606) allows none. "null" would not
    # work: it is the origin of sandboxed pages.
    params.cors_origins, params.cors_credentials = "http://nobody.invalid", False
    params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = params.ui = False
