"""A small MCP server, which a test starts: python mcp_server.py NAME."""

import os
import sys

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer(sys.argv[1])


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def fail(why: str) -> str:
    """Fail."""
    raise ToolError(why)


@server.tool()
def end() -> str:
    """End the whole server."""
    os._exit(3)


@server.tool()
def pid() -> int:
    """The process of the server."""
    return os.getpid()


if __name__ == "__main__":
    server.run("stdio")
