"""Benchmarks of wsfast: ``python -m bench`` lists them. What they measure, and what they do not, is in README.md.

A benchmark is a file of this package with a :class:`bench.harness.Benchmark` in its ``BENCHMARKS``; nothing else
needs to know of it.
"""
