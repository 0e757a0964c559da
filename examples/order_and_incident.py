"""An order and its incident: committed together, or gone together.

    $ pip install incidentkit
    $ python order_and_incident.py

It works on an SQLite file of its own, which it removes at the end.
"""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import Column, Integer, MetaData, String, Table, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from incidentkit import IncidentClient

metadata = MetaData()
orders = Table(
    "orders",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("status", String, nullable=False),
)


async def lose_order(number: int, incidents: IncidentClient, engine: AsyncEngine) -> None:
    """Record a lost order and an incident about it, in one transaction."""
    async with engine.begin() as connection:
        await connection.execute(insert(orders).values(number=number, status="lost"))
        joined = incidents.join(connection)
        await joined.create(f"Order {number} is lost", source="operator")
        if number % 2 == 0:
            raise RuntimeError("the warehouse has found it")


async def report(incidents: IncidentClient, engine: AsyncEngine) -> None:
    """Print what there is."""
    async with engine.connect() as connection:
        count = await connection.scalar(select(func.count()).select_from(orders))
    found = await incidents.search(total=True)
    changes = (await incidents.read_changes()).changes
    print(f"{count} orders, {found.total} incidents, {len(changes)} changes")


async def main() -> None:
    """Lose two orders, of which one is found again in time."""
    with TemporaryDirectory() as folder:
        engine = create_async_engine(f"sqlite+aiosqlite:///{Path(folder) / 'shop.db'}")
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        async with IncidentClient.open(engine) as incidents:
            await lose_order(7, incidents, engine)
            await report(incidents, engine)
            try:
                await lose_order(8, incidents, engine)
            except RuntimeError as error:
                print("Rolled back:", error)
            await report(incidents, engine)
        await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
