"""Experiments that a command runs: python -m examples.NAME prints its numbers and draws pictures.

They write into docs/ only on request (--page or --fill).
"""
