class SimRig:
    pass
