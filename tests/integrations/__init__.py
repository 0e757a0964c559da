"""The integrations, each on its real framework."""
