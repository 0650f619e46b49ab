"""Building and reading maze data sets."""
