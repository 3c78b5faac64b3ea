"""Servers that benchmarks start in processes of their own; see __main__.py."""
