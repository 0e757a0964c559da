"""A Django app: a client on a database of the project, and the verbs in its transactions.

.. code-block:: python

    INSTALLED_APPS = ["incidentkit.integrations.django"]
"""

from __future__ import annotations

from incidentkit.integrations.django.clients import client, join

__all__ = ["client", "join"]
