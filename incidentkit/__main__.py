"""Run the command line as ``python -m incidentkit``."""

from incidentkit.cli.program import main

if __name__ == "__main__":
    main()
