"""Tests that need Schemathesis."""
