"""Whole movies, in chunks on all cores or on a cluster."""
