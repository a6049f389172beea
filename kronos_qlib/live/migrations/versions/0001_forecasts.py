"""The first schema: sets of forecasts and their rows."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "ledger_sets",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("date", sa.DateTime, nullable=False),
        sa.Column("experiment", sa.String, nullable=False),
        sa.Column("recorder", sa.String, nullable=False),
        sa.Column("settings_digest", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("made_at", sa.DateTime, nullable=False),
        sa.Column("live", sa.Boolean, nullable=False),
        sa.Column("next_session_opens_at", sa.DateTime, nullable=False),
        sa.Column("opening_from", sa.String, nullable=False),
        sa.Column("store", sa.String, nullable=False),
        sa.Column("region", sa.String, nullable=False),
        sa.Column("exchange", sa.String),
        sa.Column("freq", sa.String, nullable=False),
        sa.Column("label", sa.String),
        sa.Column("horizon", sa.Integer),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("promised", sa.JSON),
        sa.Column("versions", sa.JSON, nullable=False),
        sa.Column("weights_digest", sa.String, nullable=False),
        sa.Column("data_digest", sa.String, nullable=False),
        sa.Column("content_digest", sa.String, nullable=False, unique=True),
        sa.Column("instruments", sa.Integer, nullable=False),
        sa.UniqueConstraint("date", "experiment", "recorder", "settings_digest", "version"),
    )
    numbers = ["score", "rank", "last_close", "prob_up", "q05", "q10", "q25", "q50", "q75", "q90", "q95"]
    op.create_table(
        "ledger_forecasts",
        sa.Column("set_id", sa.Integer, sa.ForeignKey("ledger_sets.id"), primary_key=True),
        sa.Column("instrument", sa.String, primary_key=True),
        *(sa.Column(name, sa.Double) for name in [*numbers, "label", "came"]),
        sa.Column("filled_at", sa.DateTime),
    )


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("ledger_forecasts")
    op.drop_table("ledger_sets")
