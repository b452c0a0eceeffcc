"""Microbenchmarks of the operators: `python -m benchmarks.run --device cpu`."""
