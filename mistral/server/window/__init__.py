"""The window: the page at /, and what the server does for it alone.

The page's files are in mistral/server/page/. It talks to the model through /v1/chat/completions,
as every other client; the routes under /page/ tell it about the server.
"""
