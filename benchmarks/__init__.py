"""What training, sampling and likelihoods cost, measured: ``python -m benchmarks --config configs/NAME.py``."""
