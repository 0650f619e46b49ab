"""Transformer layers shared by every network, and one decoder-only language model on them."""
