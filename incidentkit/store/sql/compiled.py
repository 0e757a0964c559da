"""Compile a statement once for a driver, and convert the values of its calls.

A statement is compiled when it first runs. After that, a call does not go through SQLAlchemy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

from attrs import frozen
from sqlalchemy import Dialect, Executable

from incidentkit.store.executor import Rows
from incidentkit.store.sql.naming import TRANSLATE_MAP
from incidentkit.store.sql.rows import Convert, Converter, UtcDateTime, convert_rows, read_time


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
    """A statement, compiled for a driver.

    Attributes:
        text: The SQL.
        bind: Returns the values of a call as the driver takes them.
        converters: The columns whose values have to be converted, and their converters.
    """

    text: str
    bind: Callable[[Mapping[str, Any]], Any]
    converters: Sequence[Converter]

    def read(self, rows: Sequence[Sequence[Any]]) -> Rows:
        """Return rows of the driver with the types that the statement declares.

        Raises:
            StoreError: If a value cannot be converted.
        """
        return convert_rows(rows, self.converters) if self.converters else rows


class Statements:
    """The compiled statements of one kind of driver.

    Args:
        dialect: SQLAlchemy's dialect for it, which needs no driver to compile.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        # An entry lives as long as its statement, which a client or a module keeps.
        self._compiled: WeakKeyDictionary[Executable, Compiled] = WeakKeyDictionary()

    def __call__(self, statement: Executable) -> Compiled:
        """Return the statement, compiled for the driver and for the schema that it names."""
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
        parameters = [self._parameter(name, compiled.binds[name]) for name in names]
        return Compiled(
            compiled.string,
            _binder(parameters, positional=bool(compiled.positional)),
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
        if isinstance(column_type, UtcDateTime):
            return read_time if self._dialect.name == "sqlite" else None
        convert: Convert | None = column_type.dialect_impl(self._dialect).result_processor(
            self._dialect, None
        )
        return convert


def _binder(
    parameters: Sequence[Parameter], *, positional: bool
) -> Callable[[Mapping[str, Any]], Any]:
    if not positional:
        return lambda values: {each.name: each.bind(values) for each in parameters}
    if len(parameters) > 1 and not any(each.constant or each.convert for each in parameters):
        return itemgetter(*(each.name for each in parameters))
    return lambda values: [each.bind(values) for each in parameters]
