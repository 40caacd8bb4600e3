"""Solvers of ordinary differential equations: one step size for a batch, or one for each example."""

from .integrators import ADAPTIVE, EACH, FIXED, GaveUp, Solver, integrate, integrate_each

__all__ = ["ADAPTIVE", "EACH", "FIXED", "GaveUp", "Solver", "integrate", "integrate_each"]
