"""The APIs: each file has one, from a request's body to a task, and from its answer to a reply.

Nothing here knows of sockets or of the engine. The fields of the requests say what is done with
them, and docs/reference/endpoints.md is made of that.
"""
