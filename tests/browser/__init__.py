"""Tests with a real browser and a real proxy; `nox -s browser` runs them."""
