"""Simulated movies, whose truth is known."""

from .movie import simulate_movie as simulate_movie, SimulatedTruth as SimulatedTruth
