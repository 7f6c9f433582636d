"""Many trainings held against each other: sweeps of fine-tuning jobs, the tests that compare them, and reports."""
