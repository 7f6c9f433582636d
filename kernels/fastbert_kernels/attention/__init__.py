"""Exact attention with an additive, learned bias, given as a matrix or as the components of TUPE's bias."""
