"""Hydra plugins of capacity_gap: the grid sweeper and the folder of named sweeps."""
