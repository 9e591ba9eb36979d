"""The models of a run over time, measured one by one."""
