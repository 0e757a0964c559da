"""Tests that need promtool."""
