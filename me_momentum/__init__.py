"""Attentive Feature Mixup (ECCV 2020)."""
