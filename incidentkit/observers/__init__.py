"""Observers for OpenTelemetry and Prometheus, each with its own extra."""
