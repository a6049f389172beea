"""Alembic's entry: brings the database of the connection that `Ledger` gives to today's schema, in its transaction."""

from alembic import context

from kronos_qlib.live.ledger import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
