"""Self-supervised Adversarial Noisy Masking for learning with noisy labels (CVPR 2023)."""
