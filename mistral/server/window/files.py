"""The page's files."""

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from mistral.server.protocol.errors import ApiError

FOLDER = Path(__file__).resolve().parents[1] / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}


async def page_file(request: Request) -> Response:
    """GET / and GET /page/FILE. ApiError (404) for what is not one of the page's files.

    A browser asks each time whether a file has changed: an updated server has an updated page.
    """
    name = request.path_params.get("file", "index.html")
    # The files are looked up by name, so that no path can lead out of the folder.
    files = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*.*")}
    path = files.get(name)
    if path is None or path.suffix not in _TYPES or not path.is_file():
        raise ApiError(404, "the page has no such file", code="not_found")
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers | {"Content-Type": _TYPES[path.suffix]})
