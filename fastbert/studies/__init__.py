"""Studies of many trainings: an engine that runs their jobs, and the studies built on it."""
