"""Users' files → bars → a Qlib store. There is no Kronos in this room, and no Qlib.

`tables` reads files as they were written, `bars` makes bars of them, `symbols` and `rules` find what a source does not
say, `store` writes a Qlib store; `store_files` reads one, `store_check` says what is odd in it, and `selection` takes
the bars of one instrument from a file or a store.
"""
