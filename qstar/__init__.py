"""q*: data sampled from the geometric mixture of a current and a target language model.

q_alpha is proportional to pi_theta^alpha * pi_t^(1-alpha); alpha is the weight of pi_theta
everywhere in this package.
"""
