"""Devices, processes, batches, augmentation and what else computes on the device."""
