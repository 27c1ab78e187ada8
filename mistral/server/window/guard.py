"""Who may use the window: this machine's own page, not a page of another origin.

The page is served without a password to a browser that has pages of other origins open. Those can
send requests to this server. What keeps them out:

    Host    a page of another domain whose name was made to point here (DNS rebinding) sends its
            own name as Host; only addresses, localhost and named hosts are accepted
    Origin  a browser sends the origin of the page that asks; only the page's own is accepted
    token   a secret of this process, which only the page can read
"""

import hmac
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from mistral.errors import shown
from mistral.server.protocol.errors import ApiError

_TOKEN_HEADER = "x-page-token"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def is_of_the_window(path: str) -> bool:
    """Whether a path belongs to the window."""
    return path == "/" or path.startswith("/page/")


def secure(response: Response, path: str) -> None:
    """Add the headers of the window to a response, unless it has its own."""
    if is_of_the_window(path):
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)


def check_host(request: Request, host_names: Sequence[str]) -> None:
    """ApiError (403) for a request to a name that is not this server's.

    host_names  under which the server may be reached, besides addresses and localhost
    """
    host = request.headers.get("host", "")
    name = _name_of(host)
    if not (_is_address(name) or name in _own_names() or name in host_names):
        raise _forbidden(
            f"the host {shown(host)} is not known here: open the page at the server's address, or "
            "name the host with --host-name"
        )


def check_origin(request: Request) -> None:
    """ApiError (403) unless the request comes from the window's own page, or from no page."""
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    if origin is not None and _authority(origin) != host.lower():
        raise _forbidden(f"a page of {shown(origin)} may not use this")
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise _forbidden("a page of another origin may not use this")


def check_token(request: Request, token: str) -> None:
    """ApiError (403) unless the request has the token of this process."""
    given = request.headers.get(_TOKEN_HEADER, "")
    if not hmac.compare_digest(given.encode(), token.encode()):
        raise _forbidden("the page's token is missing or of an earlier server: reload the page")


def _name_of(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _authority(origin: str) -> str | None:
    """The host and port of an origin; None for "null" and what is not an origin."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    is_origin = parts.scheme in ("http", "https") and not parts.path
    return parts.netloc.lower() if is_origin else None


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _own_names() -> tuple[str, str]:
    return "localhost", socket.gethostname().lower()


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code="forbidden")
