"""Evaluation: a checkpoint and held-out episodes in; errors beside the zero, mean and persistence baselines out."""
