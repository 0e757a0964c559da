"""Measures the speed of incidentkit against alternatives: `python -m benchmarks --help`."""
