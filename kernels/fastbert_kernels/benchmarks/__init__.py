"""Benchmarks of the kernels: resource usage when compiled, the fastest configurations, and times compared with
PyTorch.

    python -m fastbert_kernels.benchmarks compiled | tune | attention | vocabulary | report --out FOLDER

Needs only torch, Triton and this package. Every result is a row of a JSON file, written as soon as it is known.
"""
