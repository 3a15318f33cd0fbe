"""The policy: VL tokens, robot state and a sensor window in, a chunk of actions (mm, degrees) out; one trunk, two
heads."""
