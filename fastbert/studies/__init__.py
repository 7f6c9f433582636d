"""Many trainings compared: an engine that runs their jobs, and the studies that stand on it."""
