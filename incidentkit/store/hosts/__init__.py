"""A host's own engines and connections."""
