"""What must be seen on a GPU before a run can be trusted to it, and how fast it is there.

`steps` lists the steps, `runner` runs each in a process of its own, `report` holds what a step found.
"""
