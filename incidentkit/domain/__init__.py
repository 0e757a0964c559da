"""The domain: values, rules, commands and queries, without a database or an event loop."""
