"""PostgreSQL: its statements, and an asyncpg pool."""
