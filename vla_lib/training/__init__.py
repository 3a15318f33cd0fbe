"""Prepared episodes and their VL cache in, checkpoints of a policy out: settings, samples, state, one loop."""
