"""Launchers for clusters: Slurm through submitit, and Ray."""
