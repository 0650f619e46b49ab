"""Adaptive computation time: recurrent ponder loops, Universal Transformers, mazes and toy tasks."""
