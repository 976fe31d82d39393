"""Manifold DivideMix: semi-supervised contrastive learning under label noise and out-of-distribution images (CVPR-W 2024)."""
