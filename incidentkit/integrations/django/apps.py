"""The configuration of the Django app."""

from __future__ import annotations

from django.apps import AppConfig
from django.db.models.signals import post_migrate

from incidentkit.integrations.django.schema import upgrade_after_migrate


class IncidentKitConfig(AppConfig):
    """Upgrades the tables of incidentkit with ``manage.py migrate``."""

    name = "incidentkit.integrations.django"
    label = "incidentkit"
    verbose_name = "incidentkit"

    def ready(self) -> None:
        """Register what runs after ``manage.py migrate``."""
        post_migrate.connect(
            upgrade_after_migrate, sender=self, dispatch_uid="incidentkit.integrations.django"
        )
