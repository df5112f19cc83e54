"""Define the divergences on probabilities as printed in the papers, as a reference for the optimized versions."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(
    name: str,
    p: Tensor,
    q: Tensor,
    alpha: float = 0.1,
    beta: float = 0.5,
    jeffreys_weight: float = 0.5,
    akl_mu: float = 0.5,
    ab_alpha: float = 0.2,
    ab_beta: float = 0.7,
    amid_a: float = 0.5,
    amid_lambda: float = 0.1,
    amid_divergence: str = "kl",
    amid_from: str = "teacher",
    taid_start: float = 0.4,
    targets: Tensor | None = None,
) -> Tensor:
    """Return the value per row, differentiable by autograd. targets: for ``atkd``, whose two terms are added unweighted."""

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
        "akl": lambda: adaptive_kl(p, q, akl_mu),
        "ab": lambda: alpha_beta(p, q, ab_alpha, ab_beta),
        "amid": lambda: alpha_mixture(p, q, amid_a, amid_lambda, amid_divergence, amid_from, ab_alpha, ab_beta),
        "taid": lambda: kl(geometric(p, q.detach(), taid_start), q),
        "atkd": lambda: sum(decoupled(p, q, some_targets(p) if targets is None else targets)),
    }[name]()


def some_targets(p: Tensor) -> Tensor:
    """Return a target for every row, for tests that have none."""
    return torch.arange(len(p)) % 3


def geometric(p: Tensor, q: Tensor, t: float) -> Tensor:
    r = p**t * q ** (1 - t)
    return r / r.sum(-1, keepdim=True)


def adaptive_kl(p: Tensor, q: Tensor, mu: float) -> Tensor:
    """Compute AKL (Wu et al. 2024): weight KL and RKL by the gap over the head and the tail of the sorted vocabulary.

    The weights have no gradient.
    """
    likeliest_first, order = p.sort(-1, descending=True)
    gap = (p - q).abs().detach().gather(-1, order)
    in_head = likeliest_first.cumsum(-1) - likeliest_first < mu
    head, tail = (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)
    kl, rkl = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    return (head * kl + tail * rkl) / (head + tail).clamp(min=1e-300)


def alpha_beta(p: Tensor, q: Tensor, a: float, b: float) -> Tensor:
    """Compute the alpha-beta divergence (Cichocki, Cruces and Amari 2011), in the five cases of the paper."""
    if a == 0 and b == 0:
        return 0.5 * (p.log() - q.log()).square().sum(-1)
    if a == 0:
        return (q**b * (q**b / p**b).log() - q**b + p**b).sum(-1) / b**2
    if b == 0:
        return (p**a * (p**a / q**a).log() - p**a + q**a).sum(-1) / a**2
    if a + b == 0:
        return ((q**a / p**a).log() + p**a / q**a - 1).sum(-1) / a**2
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def alpha_mixture(p, q, a: float, lam: float, inner: str, start: str, ab_alpha: float, ab_beta: float) -> Tensor:
    """Compute AMiD (2026): the divergence of the teacher or the student from the normalized assistant."""
    if a == 1:
        r = geometric(p, q, lam)
    else:
        k = (1 - a) / 2
        r = (lam * p**k + (1 - lam) * q**k) ** (1 / k)
        r = r / r.sum(-1, keepdim=True)
    return divergence(inner, p if start == "teacher" else q, r, ab_alpha=ab_alpha, ab_beta=ab_beta)


def decoupled(p: Tensor, q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (TKD, DKD) per row, as in ATKD (2024), with the mass of the other tokens as a sum."""
    tkd, dkd = [], []
    for p_V, q_V, y in zip(p, q, targets, strict=True):
        others = torch.arange(len(p_V)) != y
        p_rest, q_rest = p_V[others].sum(), q_V[others].sum()
        tkd.append(p_V[y] * (p_V[y] / q_V[y]).log() + p_rest * (p_rest / q_rest).log())
        p_hat, q_hat = p_V[others] / p_rest, q_V[others] / q_rest
        dkd.append((p_hat * (p_hat / q_hat).log()).sum())
    return torch.stack(tkd), torch.stack(dkd)
