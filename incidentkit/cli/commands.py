"""Commands that refuse arguments that click silently accepts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click


class _Strict(click.Command):
    """Refuses a repeated option that takes one value, and text in another encoding."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Check the arguments, then parse them into the context.

        Raises:
            UsageError: If an option that takes one value is repeated, or a value is not in the
                terminal's encoding.
        """
        # The completion of a shell parses arguments that are still being typed.
        if not ctx.resilient_parsing:
            values, _, order = self.make_parser(ctx).parse_args([*args])
            # --help and --version end the command before any other check.
            if not any(parameter.is_eager for parameter in order):
                _check_repetition(ctx, order)
                _check_encoding(ctx, order, values)
        return super().parse_args(ctx, args)


class Command(_Strict):
    """A command with strict options."""


class Group(_Strict, click.Group):
    """A group of strict commands."""

    command_class = Command


def _check_repetition(ctx: click.Context, order: Sequence[click.Parameter]) -> None:
    for option in order:
        if not isinstance(option, click.Option) or option.multiple or option.count:
            continue
        if not option.is_flag and (count := order.count(option)) > 1:
            name = max(option.opts, key=len)
            message = f"Option '{name}' takes one value; it was given {count} times."
            raise click.BadOptionUsage(name, message, ctx)


def _check_encoding(
    ctx: click.Context, order: Iterable[click.Parameter], values: dict[str, Any]
) -> None:
    """Raise if Python could not decode a value: it then holds the bytes as lone surrogates."""
    for parameter in order:
        given = values.get(parameter.name or "")
        for value in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(value, str) and not _is_text(value):
                encoding = sys.getfilesystemencoding()
                message = f"it is not in the terminal's encoding, {encoding}"
                raise click.BadParameter(message, ctx, parameter)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
