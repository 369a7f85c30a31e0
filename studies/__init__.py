"""Experiments that train or measure several things and print a table."""
