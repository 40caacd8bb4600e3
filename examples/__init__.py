"""Experiments that a command runs: python -m examples.NAME prints its numbers and draws its picture into docs."""
