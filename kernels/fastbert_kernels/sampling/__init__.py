"""Distinct words drawn from a softmax over the vocabulary."""
