"""Statements as the drivers of a host's own connections take them.

A statement is compiled once for each driver, when it first runs; SQLAlchemy takes no part in a
call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from attrs import frozen
from sqlalchemy import Dialect, Executable

from incidentkit.store.executor import Rows
from incidentkit.store.sql.naming import TRANSLATE_MAP
from incidentkit.store.sql.rows import UtcDateTime, unreadable_row

Convert: TypeAlias = Callable[[Any], Any]


@frozen
class Parameter:
    """A parameter of a statement.

    Attributes:
        name: Its name in the statement, and in the values of a call unless it is a constant.
        convert: Converts a value for the driver; None: the driver takes it as it is.
        constant: Whether the statement itself has the value.
        value: The converted value of a constant.
    """

    name: str
    convert: Convert | None
    constant: bool
    value: Any

    def bind(self, values: Mapping[str, Any]) -> Any:
        """Return the value for the driver."""
        if self.constant:
            return self.value
        value = values[self.name]
        return value if self.convert is None else self.convert(value)


@frozen
class Compiled:
    """A statement as a driver takes it.

    Attributes:
        text: The SQL.
        parameters: Its parameters, in order.
        positional: Whether the driver takes the values in that order, and not by name.
        converters: The columns whose values have to be converted, with what converts them.
    """

    text: str
    parameters: tuple[Parameter, ...]
    positional: bool
    converters: tuple[tuple[int, Convert], ...]

    def bind(self, values: Mapping[str, Any]) -> Any:
        """Return the values for the driver."""
        if self.positional:
            return [each.bind(values) for each in self.parameters]
        return {each.name: each.bind(values) for each in self.parameters}

    def read(self, rows: Sequence[Sequence[Any]]) -> Rows:
        """Return rows of the driver with the types that the statement declares.

        Raises:
            StoreError: If a value cannot be converted.
        """
        if not self.converters:
            return rows
        return [self._read(row) for row in rows]

    def _read(self, row: Sequence[Any]) -> Sequence[Any]:
        values = list(row)
        try:
            for column, convert in self.converters:
                values[column] = convert(values[column])
        except (TypeError, ValueError) as error:
            raise unreadable_row() from error
        return tuple(values)


class Statements:
    """The compiled statements of one kind of driver.

    Args:
        dialect: SQLAlchemy's dialect for it, which needs no driver to compile.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        # For as long as its client or module keeps a statement.
        self._compiled: WeakKeyDictionary[Executable, Compiled] = WeakKeyDictionary()

    def __call__(self, statement: Executable) -> Compiled:
        """Return the statement for the driver, on the tables of the schema that it has."""
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = self._compiled[statement] = self._compile(statement)
        return compiled

    def _compile(self, statement: Executable) -> Compiled:
        clause: Any = statement
        translate_map = clause.get_execution_options().get(TRANSLATE_MAP)
        compiled = clause.compile(
            dialect=self._dialect,
            schema_translate_map=translate_map,
            render_schema_translate=bool(translate_map),
        )
        names = compiled.positiontup if compiled.positional else {*compiled.bind_names.values()}
        columns = getattr(clause, "exported_columns", ())
        return Compiled(
            compiled.string,
            tuple(self._parameter(name, compiled.binds[name]) for name in names),
            bool(compiled.positional),
            tuple(
                (place, convert)
                for place, column in enumerate(columns)
                if (convert := self._converter(column.type)) is not None
            ),
        )

    def _parameter(self, name: str, bound: Any) -> Parameter:
        convert = bound.type.dialect_impl(self._dialect).bind_processor(self._dialect)
        if bound.required:
            return Parameter(name, convert, constant=False, value=None)
        value = bound.effective_value
        return Parameter(
            name, convert, constant=True, value=value if convert is None else convert(value)
        )

    def _converter(self, column_type: Any) -> Convert | None:
        implementation = column_type.dialect_impl(self._dialect)
        convert: Convert | None = implementation.result_processor(self._dialect, None)
        if convert is None or not isinstance(column_type, UtcDateTime):
            return convert

        def read_time(value: Any) -> Any:
            # A converter that the host has registered for a type of column may have read it.
            if not isinstance(value, datetime):
                return convert(value)
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value

        return read_time if self._dialect.name == "sqlite" else None
