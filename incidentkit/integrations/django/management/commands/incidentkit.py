"""The command that inspects and upgrades the tables."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS

from incidentkit.domain.errors import IncidentKitError
from incidentkit.integrations.django import schema


class Command(BaseCommand):
    """Upgrade or check the tables of incidentkit."""

    help = "Upgrade or check the tables of incidentkit in a database of the project."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the action and the database."""
        parser.add_argument("action", choices=("upgrade", "check", "current"))
        parser.add_argument(
            "--database",
            default=DEFAULT_DB_ALIAS,
            help='The name of the database in DATABASES; the default is "default".',
        )

    def handle(self, *_: Any, action: str, database: str, **__: Any) -> None:
        """Run the action.

        Raises:
            CommandError: If it fails.
        """
        try:
            if action == "upgrade":
                schema.upgrade(database)
            if action == "check":
                schema.check(database)
                self.stdout.write("The schema is up to date.")
            else:
                self.stdout.write(schema.current(database) or "no tables")
        except IncidentKitError as error:
            raise CommandError(str(error)) from error
