"""The verbs for programs without an event loop."""
