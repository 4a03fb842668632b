"""Movie files, read and written with NumPy alone."""
