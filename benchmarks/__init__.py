"""Figures for the README: ``python -m benchmarks``, or one of them: ``python -m benchmarks gpt2``."""
