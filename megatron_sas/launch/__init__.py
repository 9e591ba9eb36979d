"""How processes start: the process group, compiled kernels, the watchdog."""
