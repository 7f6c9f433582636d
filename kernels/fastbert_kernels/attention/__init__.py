"""Exact attention with an additive, learned bias, as a matrix or by TUPE's parts."""
