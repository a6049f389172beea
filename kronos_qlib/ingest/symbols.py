"""Symbols as sources write them → the names of instruments in a Qlib store."""

import re

_EXCHANGES = {"SH": "SH", "SS": "SH", "XSHG": "SH", "SZ": "SZ", "XSHE": "SZ", "BJ": "BJ", "XBSE": "BJ"}
_OF_CHINA = re.compile(r"(?P<before>sh|sz|bj)?\.?(?P<digits>\d{6})(\.(?P<after>[A-Z]+))?", re.IGNORECASE)
_FIRST_DIGITS = {"6": "SH", "9": "SH", "5": "SH", "0": "SZ", "1": "SZ", "2": "SZ", "3": "SZ", "4": "BJ", "8": "BJ"}
# Bare codes that are an index of Shanghai and may be a share of Shenzhen: decided by the price, or asked about.
OFTEN_INDICES = frozenset(("000300", "000016", "000688", "000852", "000905", "000906", "000985"))
ASKED = frozenset(("000300",))
SHARE_PRICE, INDEX_PRICE = 300.0, 1000.0  # no such share is above, no such index below
_INDEX = re.compile(r"SH000\d{3}|SH93\d{4}|SZ399\d{3}|\^.+")
_FOREIGN = re.compile(r"[^A-Z0-9._^=-]+")


def instrument_name(symbol: str) -> str:
    """Return the name of an instrument: SH600000 for mainland China's, else the symbol in capitals.

    What no folder may be called (a slash, a colon) becomes a hyphen. A bare 600000 is of the exchange that its first
    digit belongs to.
    """
    text = symbol.strip()
    match = _OF_CHINA.fullmatch(text)
    if match:
        exchange = match["before"] or match["after"] or _FIRST_DIGITS.get(match["digits"][0], "")
        known = _EXCHANGES.get(exchange.upper())
        if known:
            return f"{known}{match['digits']}"
    return _FOREIGN.sub("-", text.upper()).strip("-.")


def is_index(instrument: str) -> bool:
    """Return whether a name is that of an index, whose price is no money for its volume."""
    return _INDEX.fullmatch(instrument) is not None


def exchange_of(instrument: str) -> str | None:
    """Return the exchange whose sessions an instrument follows, where its name tells: XSHG, 24/7; else None."""
    if re.fullmatch(r"(SH|SZ|BJ)\d{6}", instrument):
        return "XSHG"
    if re.search(r"(USDT|USDC|BUSD|-USD|-BTC|-ETH)(-USDT)?$", instrument):
        return "24/7"
    return None
