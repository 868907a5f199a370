"""Micro-benchmarks, for work on one part: `python -m pytest benchmarks/micro`. Not part of the tests."""
