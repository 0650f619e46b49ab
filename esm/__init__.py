"""Episodic Steering Memory: corrections mined offline, retrieved and added to the residual stream.

A frozen language model answers in segments that end with a delimiter. Where right and wrong answers
to the same question reach the same control point, the difference of their mean hidden states is a
correction; online, the current hidden state finds similar corrections, a few are tried for some
tokens, and the best one steers the next segment (arXiv 2602.04925).
"""
