"""What Qlib calls: KronosModel and what it records."""
