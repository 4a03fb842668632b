"""Learning an estimator's parameters from a movie."""
