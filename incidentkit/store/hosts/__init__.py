"""Run statements on engines and connections of the host: the application around incidentkit."""
