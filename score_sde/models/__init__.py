"""Models: what a score model answers with, how a network becomes one, exact ones, and models made of models."""
