"""Users' files → bars. There is no Kronos in this room."""
