"""Faults of the machine and of the user."""
