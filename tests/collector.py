"""Garbage collection in the processes of the tests: seldom, since it looks through all objects of torch. Imported by
tests/conftest.py, and first by fork servers, whose children inherit the setting."""

import gc

gc.set_threshold(20_000, 50, 1000)
