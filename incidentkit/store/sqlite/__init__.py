"""SQLite: its statements, and a file or a database in memory."""
