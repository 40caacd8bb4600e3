"""Experiments that a command runs: python -m examples.NAME prints its numbers and draws pictures.

It writes into docs/ only where it is told to.
"""
