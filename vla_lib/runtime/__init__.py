"""The dual-rate runner: it moves a robot safely with a fast policy and VL features that arrive late.

    runner = Runner(io, expert, vlm, clock, RunnerSettings(), SafetyLimits(...)); log = runner.run(max_s=30)

A slow worker (VLM, ~3.33 Hz) hands over its newest finished features with their age, a fast expert (10 Hz) turns them,
the newest sensor window and the robot's state into action chunks. The same loop runs on a simulated clock
(deterministic) and on the real one.
"""
