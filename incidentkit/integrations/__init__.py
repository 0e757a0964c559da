"""Integrations with web frameworks, one module each; a module imports its framework."""
