"""Comparison of groups of tasks with the baselines that need no affinities."""
