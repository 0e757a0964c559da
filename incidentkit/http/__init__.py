"""The REST service: an ASGI app around a client."""
