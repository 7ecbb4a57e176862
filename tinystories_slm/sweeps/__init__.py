"""Sweeps: many runs from one file, their table, plots and power law."""
