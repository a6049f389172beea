"""The generation engine: windows of normalised bars → sample paths. Knows neither pandas nor Qlib."""
