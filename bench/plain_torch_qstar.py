"""Two models mixed token by token the plain way: transformers forwards, eager bisection in PyTorch.

What one writes first: probabilities instead of logarithms, clamped at 1e-10; 20 halvings, each a
dozen operations over [B, V]; diagnostics from ratios of probabilities; `torch.multinomial`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def bisect_alpha(p_theta: Any, p_t: Any, halvings: int = 20) -> Any:
    """Weight of pi_theta [B] at which both divergences are equal, from probabilities [B, V]."""
    import torch

    log_theta, log_t = p_theta.log(), p_t.log()
    low = torch.zeros(p_t.shape[0], 1)
    high = torch.ones(p_t.shape[0], 1)
    for _ in range(halvings):
        middle = (low + high) / 2
        q = torch.softmax(middle * log_theta + (1 - middle) * log_t, dim=-1).clamp_min(1e-10)
        to_theta = (q * (q.log() - log_theta)).sum(-1, keepdim=True)
        to_t = (q * (q.log() - log_t)).sum(-1, keepdim=True)
        right = to_theta > to_t
        low, high = torch.where(right, middle, low), torch.where(right, high, middle)
    return (low + high) / 2


def generate(
    models: Sequence[Any], prompts: np.ndarray, new_tokens: int, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Continues prompts [B, P] of one length by sampling from the mixture.

    Returns:
        Tokens [B, N] and the per-token diagnostics [B, N, 4]: alpha, both divergences, ESS ratio.
    """
    import torch

    tokens, records = [], []
    ids = torch.from_numpy(prompts.astype(np.int64))
    caches: list[Any] = [None, None]
    with torch.inference_mode():
        for _ in range(new_tokens):
            probabilities = []
            for i, model in enumerate(models):
                out = model(input_ids=ids, past_key_values=caches[i], use_cache=True)
                caches[i] = out.past_key_values
                logits = out.logits[:, -1].float() / temperature
                probabilities.append(torch.softmax(logits, dim=-1).clamp_min(1e-10))
            p_theta, p_t = probabilities
            alpha = bisect_alpha(p_theta, p_t)
            q = torch.softmax(alpha * p_theta.log() + (1 - alpha) * p_t.log(), dim=-1)
            ids = torch.multinomial(q, 1)
            log_q = (q + 1e-10).log()
            ess_theta = 1 / (p_theta.square() / (q + 1e-10)).sum(-1)
            ess_t = 1 / (p_t.square() / (q + 1e-10)).sum(-1)
            record = [
                alpha[:, 0],
                (q * (log_q - p_theta.log())).sum(-1),
                (q * (log_q - p_t.log())).sum(-1),
                ess_theta / ess_t,
            ]
            tokens.append(ids[:, 0].numpy())
            records.append(torch.stack(record, dim=-1).numpy())
    return np.stack(tokens, axis=1), np.stack(records, axis=1)
