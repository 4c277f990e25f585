"""Faults of the process, the system calls, the disk and the power, against real saves on local disks."""
