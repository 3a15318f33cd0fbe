"""The workbench on top of the rooms: run folders, supervised jobs, headless notebooks, plots, widgets, reports."""
