"""Evaluation: a checkpoint on held-out episodes beside three baselines, and on the simulated rig in closed loop."""
