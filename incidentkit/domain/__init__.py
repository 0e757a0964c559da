"""What an incident is: values, rules, commands and queries, without a database or an event loop."""
