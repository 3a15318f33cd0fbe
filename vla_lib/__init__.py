"""VLA workbench: from recorded needle-insertion episodes to a policy that can be trusted on the robot."""
