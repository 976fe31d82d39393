"""Me-Momentum (ICCV 2021)."""
