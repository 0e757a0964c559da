"""A Django app: a client on the project's database, and the verbs in Django's transactions.

.. code-block:: python

    INSTALLED_APPS = ["incidentkit.integrations.django"]
"""

from __future__ import annotations

from incidentkit.integrations.django.clients import client, join

__all__ = ["client", "join"]
