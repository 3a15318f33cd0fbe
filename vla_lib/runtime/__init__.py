"""The dual-rate runner: a policy, VL features that arrive late, a robot behind `RobotIO` in; safe motion and a log of every tick out.

    runner = Runner(io, expert, vlm, clock, RunnerSettings(), SafetyLimits(...)); log = runner.run(max_s=30)

A slow worker (VLM, ~3.33 Hz) hands over its newest finished features with their age, a fast expert (10 Hz) turns them, the newest sensor
window and the robot's state into action chunks. The same loop runs on a simulated clock (deterministic) and on the real one.
"""
