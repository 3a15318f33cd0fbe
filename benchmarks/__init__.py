"""Benchmarks, one module a room: each gives rows that compare two ways of doing the same thing, measured side by side in one run."""
