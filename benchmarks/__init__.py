"""Regenerates the papers' tables by starting the papers' scripts as a user would."""
