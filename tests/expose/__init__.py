"""Tests that need nginx, OpenSSL, curl and Prometheus."""
