"""Run directories, checkpoints, results, the command line and figures."""
