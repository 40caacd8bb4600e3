"""A laboratory: every objective on the same data with the same network and budget, measured against the truth.

``python -m examples.laboratory`` trains, measures, draws and writes docs/laboratory.md. `subjects.py` is the table of
objectives and data sets: one more row is one more experiment.
"""
