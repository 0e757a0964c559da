"""How fast incidentkit is, beside others: `python -m benchmarks --help`."""
