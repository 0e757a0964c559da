"""Run the command line, as ``incidentkit`` and as ``python -m incidentkit``."""

from incidentkit import cli
from incidentkit.cli.interrupts import interrupts


def run() -> None:
    """Run the program on the arguments of the process, and end the process."""
    interrupts.install()
    # Loads the commands, which an interrupt may end from here on.
    cli.main()


if __name__ == "__main__":
    run()
