"""Qlib expressions in settings: whether they can be read, which fields they name, how far they look ahead."""

import logging
import re

from qlib.data.base import Expression
from qlib.data.data import ExpressionD


def check_expression(text: str) -> None:
    """Raise a ValueError unless the text is an expression that Qlib can read."""
    own = logging.getLogger("qlib.data")  # it would log a traceback of what is said here
    disabled, own.disabled = own.disabled, True
    try:
        ExpressionD.get_expression_instance(text)
    except Exception as error:  # Qlib evaluates the text as Python: anything may be raised
        raise ValueError(f"should hold Qlib expressions ({type(error).__name__}: {error})") from None
    finally:
        own.disabled = disabled


def named_fields(text: str) -> list[str]:
    """Return the fields that an expression names, without the $, in lower case, sorted."""
    return sorted({name.lower() for name in re.findall(r"\$(\w+)", text)})


def sessions_ahead(text: str) -> int:
    """Return how many sessions after its date an expression looks: 2 for `Ref($close, -2)`."""
    expression: Expression = ExpressionD.get_expression_instance(text)
    return int(expression.get_extended_window_size()[1])
