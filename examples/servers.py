"""Record incidents in PostgreSQL and cache lists in Redis, as the environment configures them.

Run it in a checkout:

.. code-block:: console

    $ python -m pip install '.[redis]'
    $ export POSTGRES_HOST=localhost POSTGRES_USER=postgres POSTGRES_PASSWORD=change_me
    $ export POSTGRES_DB=incidents REDIS_HOST=localhost
    $ incidentkit db upgrade
    $ python examples/servers.py

Instead of these variables you can set INCIDENTKIT_DATABASE_URL and INCIDENTKIT_REDIS_URL, or put
the variables into a file `.env` in the current folder.
"""

import asyncio
import sys

from incidentkit import IncidentClient, SchemaOutOfDate, StoreUnavailable


async def main() -> None:
    """Record an incident, and read the list from the database and then from Redis."""
    async with IncidentClient.from_env() as incidents:
        incident = await incidents.create("Payments are slow", source="partner")
        from_database = await incidents.list(source="partner")
        from_redis = await incidents.list(source="partner")
        print(f"Incident {incident.incident_id} is the newest of {len(from_database)}")
        print("Both lists are the same" if from_redis == from_database else "It has just changed")
        # Without Redis nothing fails: lists are read from the database.
        print("Lists are cached" if incidents.cache_available else "Lists are not cached")


try:
    asyncio.run(main())
except SchemaOutOfDate as error:
    sys.exit(f"Run `{error.command}` first")
except StoreUnavailable as error:
    sys.exit(f"Try again later: {error}")
