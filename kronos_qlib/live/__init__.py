"""Every evening: the latest bar's signals and orders, and a ledger of what was forecast and what came.

`signals` makes the `SignalSet` of a date from a finished run of any Qlib model, and `orders` has the run's own strategy
say what it would trade. `ledger` keeps signal sets in a database, live ones apart by `opening`; `outcomes` fills in the
bars that came; `judgement` says what the record is worth, with `paper_portfolio`; `ledger_page` shows it.
"""
