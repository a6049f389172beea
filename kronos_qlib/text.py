"""Text that comes from elsewhere (names of runs, instruments, files), made safe for a terminal and a spreadsheet."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline; escape codes begin with one of them
_FORMULA = re.compile(r"\s*[=+\-@]")


def printable(text: str) -> str:
    """Replace control characters, which a terminal would obey, by �."""
    return _CONTROL.sub("�", text)


def csv_cell(text: str) -> str:
    """Return text that no spreadsheet takes for a formula: one that begins like a formula gets an apostrophe first."""
    text = printable(text)
    return f"'{text}" if _FORMULA.match(text) else text
