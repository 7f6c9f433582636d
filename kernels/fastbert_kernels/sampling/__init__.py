"""Sampling of distinct words from a softmax over the vocabulary."""
