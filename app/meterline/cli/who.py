"""Who runs a command that changes something, and why: every change is recorded with both."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from meterline.errors import UserError

__all__ = ["By", "check_reason", "person"]

By = Annotated[str, typer.Option("--by", help="Who changes it; default: the user of this machine.")]


def person(by: str) -> str:
    """The name given, or the user's of this machine.

    Raises:
        UserError: the machine knows no name.
    """
    if by:
        return by
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name, as in many containers
        raise UserError("this machine does not know who you are; say it with --by NAME") from None


def check_reason(reason: str, example: str) -> None:
    """A change needs a reason.

    Raises:
        UserError: there is none; the text shows the example.
    """
    if not reason.strip():
        raise UserError(f"Say why: --reason {example!r}. It is kept in the ledger.")
