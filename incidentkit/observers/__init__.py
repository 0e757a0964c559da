"""Observers for OpenTelemetry and Prometheus, each with an extra of its own."""
