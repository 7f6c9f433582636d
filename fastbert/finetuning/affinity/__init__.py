"""Affinity of tasks: how a step on one task changes the losses of the others, and groups of tasks to train together."""
