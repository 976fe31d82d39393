"""Stochastic Feature Averaging for learning with long-tailed noisy labels (IJCAI 2023)."""
