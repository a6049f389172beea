"""Qlib expressions in settings: whether they can be read, which fields they name, how far they look ahead."""

import logging
import math
import re

from qlib.data.base import Expression
from qlib.data.data import ExpressionD
from qlib.data.ops import Ref


def check_expression(text: str) -> None:
    """Raise a ValueError unless the text is an expression that Qlib can read."""
    own = logging.getLogger("qlib.data")  # it would log a traceback of what is said here
    disabled, own.disabled = own.disabled, True
    try:
        read = ExpressionD.get_expression_instance(text)
    except Exception as error:  # Qlib evaluates the text as Python: anything may be raised
        raise ValueError(f"should hold Qlib expressions ({type(error).__name__}: {error})") from None
    finally:
        own.disabled = disabled
    if not isinstance(read, Expression):
        raise ValueError(f"should hold Qlib expressions, which name a field such as $close, not {text!r}")


def named_fields(text: str) -> list[str]:
    """Return the daily fields that an expression names, without the $, in lower case, sorted; those of `P($$x)` not."""
    return sorted({name.lower() for name in re.findall(r"(?<!\$)\$(\w+)", text)})


def sessions_ahead(text: str) -> int:
    """Return how many sessions after its date an expression looks: 2 for `Ref($close, -2)`."""
    return _ahead(ExpressionD.get_expression_instance(text))


def _ahead(expression: Expression) -> int:
    """Look at every part: Qlib's own `get_extended_window_size` knows of `Ref` alone, not of `Delta($close, -1)`."""
    within = max((_ahead(part) for part in vars(expression).values() if isinstance(part, Expression)), default=0)
    shift = getattr(expression, "N", 0)
    back = math.floor(shift) if isinstance(shift, (int, float)) else 0  # of EMA a share may be given
    beyond = within - back if isinstance(expression, Ref) else within + max(0, -back)
    return max(int(expression.get_extended_window_size()[1]), beyond, 0)
