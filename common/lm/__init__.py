"""Transformer building blocks shared by every language model of this repository."""
