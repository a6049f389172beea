"""Finished runs of Qlib's recorders side by side: `results` reads them, `comparison` measures, the others show.

Tables are day × instrument; a row of two runs' common data is a (datetime, instrument).
"""

DEFAULT_URI = "sqlite:///mlflow.db"  # where this project's workflows record, seen from the working directory
