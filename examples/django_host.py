"""Record incidents in a Django project, here in a single file.

Run it in a checkout:

.. code-block:: console

    $ python -m pip install . django
    $ python examples/django_host.py migrate
    $ python examples/django_host.py runserver
    $ curl -X POST http://127.0.0.1:8000/orders/7/ship
    $ curl http://127.0.0.1:8000/incidents
"""

import os
import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

from incidentkit.integrations.django import client, join

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ.get("SHOP_DATABASE", "shop.db"),
        }
    },
    INSTALLED_APPS=["incidentkit.integrations.django"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="for this example alone",  # noqa: S106
)


def ship(_: HttpRequest, order_id: int) -> HttpResponse:
    """Record an unshipped order and its incident, both or neither."""
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE IF NOT EXISTS lost_order (order_id INTEGER PRIMARY KEY)")
            cursor.execute("INSERT INTO lost_order VALUES (%s)", [order_id])
        incident = join().create(f"Order {order_id} could not be shipped", source="operator")
    return HttpResponse(f"Not shipped, see incident {incident.incident_id}", status=502)


def newest(_: HttpRequest) -> JsonResponse:
    """List the newest incidents."""
    return JsonResponse([incident.to_dict() for incident in client().list()], safe=False)


urlpatterns = [path("orders/<int:order_id>/ship", ship), path("incidents", newest)]

application = get_wsgi_application()

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
