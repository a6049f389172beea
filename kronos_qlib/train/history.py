"""history.csv: what a stage's training came through."""

import csv
from pathlib import Path

from kronos_qlib.files import whole_file

COLUMNS = ["step", "epoch", "lr", "train_loss", "val_loss"]


class History:
    """One row per logging step, rewritten whole so that a kill never leaves half a row.

    Args:
        step: rows after it belong to a past that a resumed training does not share; they are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.rows = path, []
        if step and path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def append(self, row: dict[str, float]) -> None:
        """Add a row; what it lacks stays empty."""
        self.rows.append({key: row.get(key, "") for key in COLUMNS})

    def flush(self) -> None:
        """Write the file."""
        with whole_file(self.path) as draft, draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
