"""Programs that are type-checked, never run: mypy and pyright see the types that users see."""
