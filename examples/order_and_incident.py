"""Store an order and its incident in one transaction: both are committed, or neither is.

Run it in a checkout:

.. code-block:: console

    $ python -m pip install . aiosqlite
    $ python examples/order_and_incident.py

Both are stored in `shop.db` in the current folder. When the client opens, it creates the incident
tables there.
"""

import asyncio

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from incidentkit import IncidentClient


class Base(DeclarativeBase):
    """The tables of the shop."""


class Order(Base):
    """An order of a customer."""

    __tablename__ = "orders"

    order_id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


class CardRefused(Exception):
    """The payment of an order was refused."""


async def place(engine: AsyncEngine, incidents: IncidentClient, item: str, *, paid: bool) -> None:
    """Store an order, with an incident that asks to pack it by hand."""
    async with AsyncSession(engine) as session, session.begin():
        order = Order(item=item)
        session.add(order)
        await session.flush()
        joined = incidents.join(session)
        await joined.create(f"Pack order {order.order_id} by hand: {item}", source="operator")
        if not paid:
            raise CardRefused(item)


async def main() -> None:
    """Place one order that is paid and one that is refused, then show the tables."""
    engine = create_async_engine("sqlite+aiosqlite:///shop.db")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with IncidentClient.open(engine) as incidents:
        await place(engine, incidents, "piano", paid=True)
        try:
            await place(engine, incidents, "harp", paid=False)
        except CardRefused as error:
            print(f"Not paid: {error}")

        async with AsyncSession(engine) as session:
            for order in await session.scalars(select(Order)):
                print(f"Order {order.order_id}: {order.item}")
        for incident in await incidents.list():
            print(f"Incident {incident.incident_id}: {incident.incident_message}")
    await engine.dispose()


asyncio.run(main())
