"""Tables, rows and statements, as values: no event loop and no database."""
