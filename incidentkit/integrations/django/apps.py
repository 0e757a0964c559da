"""The configuration of the Django app."""

from __future__ import annotations

from django.apps import AppConfig
from django.db.backends.signals import connection_created
from django.db.models.signals import post_migrate

from incidentkit.integrations.django.clients import close_before_drop
from incidentkit.integrations.django.schema import upgrade_after_migrate


class IncidentKitConfig(AppConfig):
    """Upgrades the tables after ``manage.py migrate``, and closes clients of test databases."""

    name = "incidentkit.integrations.django"
    label = "incidentkit"
    verbose_name = "incidentkit"

    def ready(self) -> None:
        """Register the handlers for ``manage.py migrate``, and for dropping a database."""
        post_migrate.connect(
            upgrade_after_migrate, sender=self, dispatch_uid="incidentkit.integrations.django"
        )
        connection_created.connect(
            close_before_drop, dispatch_uid="incidentkit.integrations.django"
        )
