"""Fine-tuning: tasks, metrics, the loop, prediction and GLUE's submission files."""
