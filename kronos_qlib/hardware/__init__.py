"""The machine: its cores and heap, devices, compute precision."""
