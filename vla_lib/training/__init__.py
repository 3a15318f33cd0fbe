"""Prepared episodes and their VL cache in, checkpoints of a policy out: settings, split, statistics, samples,
sampler, one loop."""
