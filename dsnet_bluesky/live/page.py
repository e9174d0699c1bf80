"""The live page: static files that the Tiled server hands out beside its API, at ``/custom/live``.

The page holds no data and this router reads none. What the page shows it asks of
Tiled's ordinary API in the viewer's browser, with the viewer's own credentials.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Depends, HTTPException, Response
from tiled.server.authentication import move_api_key

__all__ = ["router"]

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".LICENSE": "text/plain"}
"""Of the files that are handed out, by suffix."""

HEADERS = {
    # Scripts and styles from this server only, none within the page; requests to this server only.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(prefix="/live", tags=["live view"])
"""For `routers:` of Tiled's configuration."""


def _files() -> dict[str, tuple[bytes, str]]:
    """Read the files once: nothing that a browser sends is ever part of a path."""
    found = {}
    for file in (files("dsnet_bluesky.live") / "static").iterdir():
        media_type = next(value for suffix, value in MEDIA_TYPES.items() if file.name.endswith(suffix))
        found[file.name] = file.read_bytes(), media_type
    return found


_FILES = _files()


@router.get("", response_class=Response)
async def get_page(_: None = Depends(move_api_key)) -> Response:
    """Hand out the page; a key in the address becomes a cookie, as with Tiled's own page."""
    return _response("live.html")


@router.get("/{name}", response_class=Response)
async def get_file(name: str) -> Response:
    """Hand out a script or a style of the page."""
    if name not in _FILES:
        raise HTTPException(404, "The live page has no such file.")
    return _response(name)


def _response(name: str) -> Response:
    content, media_type = _FILES[name]
    return Response(content, media_type=media_type, headers=HEADERS)
