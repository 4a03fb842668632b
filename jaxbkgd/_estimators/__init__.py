"""Estimators: channels in, their background and its noise out."""
