"""``python -m incidentkit``."""

from incidentkit.cli import main

if __name__ == "__main__":
    main()
