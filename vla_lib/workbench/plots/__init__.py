"""Plots: data in, a matplotlib Figure out. Widgets, headless runs and tests call the same functions."""
