"""The kernels beside their peers: what they take when compiled, which configuration is fastest, how fast they are.

    python -m fastbert_kernels.benchmarks compiled | tune | attention | vocabulary | report --out FOLDER

Needs torch, Triton and this package, nothing else. Every result is a row of a JSON file, there as soon as it is known.
"""
