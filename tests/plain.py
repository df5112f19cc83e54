"""The definitions of the divergences on probabilities, as the papers print them: what the fast ones are held against."""

from __future__ import annotations

from torch import Tensor


def divergence(
    name: str, p: Tensor, q: Tensor, alpha: float = 0.1, beta: float = 0.5, jeffreys_weight: float = 0.5
) -> Tensor:
    """Value per row; autograd gives its gradient."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = beta * p + (1 - beta) * q
    return {
        "kl": lambda: kl(p, q),
        "rkl": lambda: kl(q, p),
        "skl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "srkl": lambda: kl(q, (1 - alpha) * p + alpha * q),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
        "jeffreys": lambda: 2 * jeffreys_weight * kl(p, q) + 2 * (1 - jeffreys_weight) * kl(q, p),
    }[name]()
