"""Benchmarks, a module a room: rows that compare two ways of doing the same thing, side by side in one run."""
