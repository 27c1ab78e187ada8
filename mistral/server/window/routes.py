"""The routes of the window."""

from mistral.server.window.about import about
from mistral.server.window.inside import kept_inside, make_inside
from mistral.server.window.run import run
from mistral.server.window.tools import call_tool

ROUTES = (
    ("GET", "/page/about", about),
    ("GET", "/page/run", run),
    ("POST", "/page/tools", call_tool),
    ("POST", "/page/inside", make_inside),
    ("GET", "/page/inside/{name}", kept_inside),
)
FILES = ("/", "/page/{file:path}")
# What needs no key: the page has to be there to ask for it
OPEN = (*FILES, "/page/inside/{name}")
