"""What no single paper owns: label noise, data sets, augmentation, devices, runs, the command line."""
