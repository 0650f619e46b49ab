"""Adaptive computation time: ponder loops, Universal Transformers, mazes and toy tasks."""
