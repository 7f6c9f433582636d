"""Weak labels: labelling functions, their table, and the models that combine their votes."""
