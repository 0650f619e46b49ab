"""Engines that sample from, look into and steer a frozen language model, behind one Protocol."""
