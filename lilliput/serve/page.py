"""The page to see it: a chat in one file, which the gateway serves at `/` and which asks nobody else for anything."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request, Response

_PAGE = Path(__file__).with_name("page.html")


def page_routes() -> APIRouter:
    """`/`, for everybody: the page asks for the gateway's token itself, so it must be had without one."""
    page = _PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # asked for each time, sent again only when it has changed
        "ETag": f'"{hashlib.sha256(page.encode()).hexdigest()}"',
    }
    routes = APIRouter()

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(page, media_type="text/html", headers=headers)

    return routes


def _policy(page: str) -> str:
    """Nothing but the page's own script and style, known by their sha256, and requests to where it came from."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_allowed(page, 'script')}",
            f"style-src {_allowed(page, 'style')}",
            "connect-src 'self'",
            "img-src data:",  # the icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _allowed(page: str, tag: str) -> str:
    texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
