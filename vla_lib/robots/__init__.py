"""The lab's rig as a `RobotIO`: the Meca500, cameras, the sensor, what says where they are, and the recorder.

    settings = RobotSettings.load("robot.yaml")
    with LabRobot(settings) as robot:
        robot.read_observation()

Packages for hardware (mecademicpy, zmq, cv2, depthai) are imported where a robot is opened that needs them.
"""
