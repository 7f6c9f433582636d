"""Continual training: rounds that continue from the last weights on new labels and a replay of the old ones."""
