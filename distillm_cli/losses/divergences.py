"""Define divergences between next-token distributions, per token, with exact gradients. Pure tensors.

p is the teacher, q the student. A divergence returns its value per token [N] and ``h_NV = ∂D/∂log q`` with the other
entries held fixed; the gradient in the student's logits is then ``h − q Σ_u h_u`` (``logit_grad``).

A divergence is one class, registered with its parameters by ``register_divergence``. To add one, write both in a file that
is imported with the built-in ones (``plugins.divergences``) or by an entry point of another package, and a reference test.
Recipes, flags, help and ``distillm methods`` follow from the registration.

Mixtures are computed from probabilities, which takes one pass over the table where ``logaddexp`` takes ten. No accuracy is
lost: a ratio like p/m is bounded by 1/α, its logarithm is computed after the division, and an entry below the smallest
normal number (1e-38 in float32) does not change a sum of probabilities. Unmixed log-probabilities are logits minus their
normalizer, so that unbounded divergences (KL, reverse KL) are correct where a probability underflows.

A logit of −inf (a suppressed token) is a probability of exactly 0, and 0 · log 0 = 0. A divergence that is then infinite
(KL where p > 0 = q, reverse KL where q > 0 = p) has the value +inf, and its gradient is undefined. All other values and
gradients are finite.

This module does not import torch at its top, since ``--help`` needs the parameters. The formulas use tensor methods.

docs/methods.md#divergences has the full table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field

from distillm_cli import plugins
from distillm_cli.config.fields import DivergenceConfig, Probability

if TYPE_CHECKING:
    from torch import Tensor

    from distillm_cli.losses.objectives import KD

Halves = tuple[tuple[float, "Divergence"], tuple[float, "Divergence"]]
ValueAndGrad = tuple["Tensor", "Tensor | None"]  # value per token [N], and h_NV where it is needed


class TokenDistributions:
    """Hold N distributions over the vocabulary, from their logits z. Each table is computed once, when first used.

    A divergence must not change the tables. has_zeros: whether logits may be −inf. False states that none is, and saves
    the passes that check for it.
    """

    def __init__(self, z_NV: Tensor, *, has_zeros: bool = True):
        self.z_NV = z_NV
        self.has_zeros = has_zeros

    @classmethod
    def of_log(cls, log_NV: Tensor) -> TokenDistributions:
        """Create from log-probabilities, which are not normalized again."""
        rows = cls(log_NV)
        rows.prob_NV = log_NV.exp()
        rows.log_norm_N1 = log_NV.new_zeros((len(log_NV), 1))
        return rows

    @cached_property
    def prob_NV(self) -> Tensor:
        return self.z_NV.softmax(-1)

    @cached_property
    def log_norm_N1(self) -> Tensor:
        """Return log Σ exp z, as max z − log max p: two maxima instead of an exp and a sum."""
        return self.z_NV.amax(-1, keepdim=True) - self.prob_NV.amax(-1, keepdim=True).log()

    @cached_property
    def log_NV(self) -> Tensor:
        return self.z_NV - self.log_norm_N1

    def log_at(self, ids_N: Tensor) -> Tensor:
        """Return the log-probability [N] of one entry per row."""
        return (self.z_NV.gather(-1, ids_N.unsqueeze(-1)) - self.log_norm_N1).squeeze(-1)

    def entropy(self) -> Tensor:
        """Return the entropy [N], nats."""
        part_NV = drop_zeros(self.log_NV * self.prob_NV, self.prob_NV, self.has_zeros)
        return part_NV.sum(-1).neg_()


class Divergence(ABC):
    """Measure D(p, q) ≥ 0, which is 0 at p = q, for every row of two [N, V] tables."""

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build from a recipe's parameters with the names of the class's fields. Override it for other names."""
        names: list[str] = [field.name for field in fields(cls)] if is_dataclass(cls) else []
        return cls(**{name: getattr(config, name) for name in names})

    @abstractmethod
    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        """Return the value per token [N], nats, and h_NV = ∂D/∂log q (None without ``with_grad``).

        Both are new tensors that the caller may change.
        """

    def for_tokens(self, targets_N: Tensor, divergence_args_N: Tensor | None) -> Divergence:
        """Return the divergence for these tokens.

        A divergence that treats the supervised token, or tokens selected by its objective, differently returns a copy that
        holds them. Others return themselves.
        """
        return self

    def halves(self) -> Halves:
        """Return (weight, divergence) of the forward half and of the reverse half.

        The forward half is computed on data set rows and teacher samples, the reverse half on student outputs. Half the sum
        of both, each on its own samples, estimates the divergence. A divergence without halves returns itself twice.
        """
        return (1.0, self), (1.0, self)

    def mirror(self) -> Divergence:
        """Return D(q, p) of this D(p, q)."""
        raise NotImplementedError(f"{self} has no mirror image")

    @property
    def has_curriculum(self) -> bool:
        """Return whether DistiLLM-2's curriculum can vary the skew of its halves."""
        return False

    def evaluate(self, log_p_NV: Tensor, log_q_NV: Tensor, with_grad: bool = True) -> ValueAndGrad:
        """Return value and h from log-probabilities."""
        return self.between(TokenDistributions.of_log(log_p_NV), TokenDistributions.of_log(log_q_NV), with_grad)

    def value(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return self.evaluate(log_p_NV, log_q_NV, with_grad=False)[0]

    def grad(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        _, h_NV = self.evaluate(log_p_NV, log_q_NV)
        assert h_NV is not None
        return h_NV


@dataclass(frozen=True)
class DivergenceEntry:
    """Describe a registered divergence. objective: the class that trains with it, or its "module:Class"; None: KD."""

    name: str
    divergence: type[Divergence]
    config: type[DivergenceConfig] | None
    objective: type[KD] | str | None

    def build(self, config: DivergenceConfig) -> Divergence:
        """Build the divergence from a recipe's parameters."""
        return self.divergence.from_config(config)

    def default(self) -> Divergence:
        """Build the divergence with its default parameters."""
        return self.build((self.config or DivergenceConfig)(divergence=self.name))

    def check(self) -> None:
        """Raise an error if the registration is invalid."""
        if self.config is not None and not issubclass(self.config, DivergenceConfig):
            raise TypeError(f"{self.config.__name__}, the parameters of {self.name}, is not a DivergenceConfig")
        self.default().halves()

    def is_own_half(self, half: int) -> bool:
        """Return whether the forward (0) or reverse (1) half is the divergence itself."""
        whole = self.default()
        return whole.halves()[half] == (1.0, whole)

    @property
    def depends_on_targets(self) -> bool:
        """Return whether the divergence treats the supervised token differently from others."""
        return self.divergence.for_tokens is not Divergence.for_tokens

    @property
    def has_own_objective(self) -> bool:
        return self.objective is not None

    @property
    def objective_class(self) -> type[KD] | None:
        """Return the objective that trains with this divergence, imported if it is given by name; None for KD."""
        if not isinstance(self.objective, str):
            return self.objective
        module, _, name = self.objective.partition(":")
        return getattr(import_module(module), name)


def register_divergence(
    name: str, *, config: type[DivergenceConfig] | None = None, objective: type[KD] | str | None = None
) -> Callable[[type[Divergence]], type[Divergence]]:
    """Register a class under its name in recipes, as a decorator.

    config: its parameters, which become keys of the recipe's ``objective`` section; None if it has none. A key of two
    divergences should mean the same in both; other keys should begin with the divergence's name. objective: the class that
    trains with it, if not KD; a text "module:Class" is imported when a run needs it.
    """

    def register(divergence: type[Divergence]) -> type[Divergence]:
        entry = DivergenceEntry(name, divergence, config, objective)
        plugins.divergences.register(name, entry, divergence.__module__)
        return divergence

    return register


def build_divergence(config: DivergenceConfig) -> Divergence:
    """Build the divergence of a recipe's ``objective`` section."""
    return plugins.divergences[config.divergence].build(config)


def logit_grad(h_NV: Tensor, q_NV: Tensor) -> Tensor:
    """Return ∂D/∂z for z the student's logits, from h = ∂D/∂log q: h − q Σ_u h_u."""
    return h_NV.addcmul(q_NV, h_NV.sum(-1, keepdim=True), value=-1)


def smallest(table_NV: Tensor) -> float:
    """Return the smallest normal number of a tensor's type."""
    import torch

    return torch.finfo(table_NV.dtype).tiny


def _ratio(x_NV: Tensor, y_NV: Tensor, a: float) -> Tensor:
    """Return x/m with m = a·x + (1−a)·y and 0 < a < 1: between 0 and 1/a, and 0 where x and m underflow."""
    m_NV = y_NV.lerp(x_NV, a)
    return x_NV / m_NV.clamp_min_(smallest(m_NV))


def _safe_log(x_NV: Tensor) -> Tensor:
    """Return log x with x clamped from below: where x is that small, so is the probability that multiplies the logarithm."""
    return x_NV.clamp_min(smallest(x_NV)).log_()


def have_zeros(*all_rows: TokenDistributions) -> bool:
    """Return whether a logit of any of these may be −inf."""
    return any(rows.has_zeros for rows in all_rows)


def drop_zeros(part_NV: Tensor, prob_NV: Tensor, zeros: bool) -> Tensor:
    """Apply 0 · log 0 = 0 to a table of probability · logarithm, in place. Without ``zeros`` return it unchanged."""
    return part_NV.masked_fill_(prob_NV == 0, 0) if zeros else part_NV


@register_divergence("kl")
@dataclass(frozen=True)
class KL(Divergence):
    """Compute the forward KL divergence, Σ p (log p − log q) (Hinton et al. 2015, arXiv 1503.02531)."""

    def halves(self) -> Halves:
        return (1.0, self), (1.0, self.mirror())

    def mirror(self) -> Divergence:
        return ReverseKL()

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        part_NV = (p.log_NV - q.log_NV).mul_(p.prob_NV)
        value_N = drop_zeros(part_NV, p.prob_NV, have_zeros(p, q)).sum(-1)
        return value_N, -p.prob_NV if with_grad else None


@register_divergence("rkl")
@dataclass(frozen=True)
class ReverseKL(Divergence):
    """Compute the reverse KL divergence, Σ q (log q − log p) (per token as in GKD, arXiv 2306.13649)."""

    def halves(self) -> Halves:
        return (1.0, self.mirror()), (1.0, self)

    def mirror(self) -> Divergence:
        return KL()

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        part_NV = drop_zeros((q.log_NV - p.log_NV).mul_(q.prob_NV), q.prob_NV, have_zeros(p, q))
        value_N = part_NV.sum(-1)
        return value_N, part_NV.add_(q.prob_NV) if with_grad else None


class SkewConfig(DivergenceConfig):
    """Declare the parameter of ``skl`` and ``srkl``."""

    alpha: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Skew of skl and srkl. The share of the other distribution in the mixture; 0 is kl or rkl."
    )


@register_divergence("skl", config=SkewConfig)
@dataclass(frozen=True)
class SkewKL(Divergence):
    """Compute the skew KL divergence, KL(p ‖ αp + (1−α)q) (DistiLLM, arXiv 2402.03898).

    Its gradient coefficient is bounded by (1−α)/α; α = 0 is KL.
    """

    alpha: float

    def halves(self) -> Halves:
        return (1.0, self), (1.0, self.mirror())

    def mirror(self) -> Divergence:
        return SkewReverseKL(self.alpha)

    @property
    def has_curriculum(self) -> bool:
        return self.alpha > 0

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        if self.alpha == 0:
            return KL().between(p, q, with_grad)
        ratio_NV = _ratio(p.prob_NV, q.prob_NV, self.alpha)
        value_N = _safe_log(ratio_NV).mul_(p.prob_NV).sum(-1)
        return value_N, ratio_NV.mul_(q.prob_NV).mul_(self.alpha - 1) if with_grad else None


@register_divergence("srkl", config=SkewConfig)
@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """Compute the skew reverse KL divergence, KL(q ‖ (1−α)p + αq) (DistiLLM, arXiv 2402.03898). α = 0 is reverse KL."""

    alpha: float

    def halves(self) -> Halves:
        return (1.0, self.mirror()), (1.0, self)

    def mirror(self) -> Divergence:
        return SkewKL(self.alpha)

    @property
    def has_curriculum(self) -> bool:
        return self.alpha > 0

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        if self.alpha == 0:
            return ReverseKL().between(p, q, with_grad)
        ratio_NV = _ratio(q.prob_NV, p.prob_NV, self.alpha)
        part_NV = _safe_log(ratio_NV).mul_(q.prob_NV)
        value_N = part_NV.sum(-1)
        if not with_grad:
            return value_N, None
        return value_N, part_NV.addcmul_(q.prob_NV, ratio_NV.mul_(-self.alpha).add_(1))


class JSDConfig(DivergenceConfig):
    """Declare the parameter of ``jsd``."""

    beta: Probability = Field(0.5, description="β of jsd: m = βp + (1−β)q.")


@register_divergence("jsd", config=JSDConfig)
@dataclass(frozen=True)
class JSD(Divergence):
    """Compute the generalized Jensen-Shannon divergence, β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q (GKD, arXiv
    2306.13649).

    It is exactly 0 at β = 0 and β = 1. Its halves are f-distill's (arXiv 2307.15190).
    """

    beta: float

    def halves(self) -> Halves:
        forward = 2 * self.beta, SkewKL(self.beta)
        reverse = 2 * (1 - self.beta), SkewReverseKL(1 - self.beta)
        return forward, reverse

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        if self.beta in (0, 1):
            value_N = q.prob_NV.new_zeros(len(q.prob_NV))
            return value_N, q.prob_NV.new_zeros(q.prob_NV.shape) if with_grad else None
        p_part_NV = _safe_log(_ratio(p.prob_NV, q.prob_NV, self.beta)).mul_(p.prob_NV)
        q_part_NV = _safe_log(_ratio(q.prob_NV, p.prob_NV, 1 - self.beta)).mul_(q.prob_NV)
        value_N = self.beta * p_part_NV.sum(-1) + (1 - self.beta) * q_part_NV.sum(-1)
        return value_N, q_part_NV.mul_(1 - self.beta) if with_grad else None


@register_divergence("tvd")
@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Compute the total variation distance, ½ Σ |p − q|, between 0 and 1 (f-distill, arXiv 2307.15190)."""

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        gap_NV = q.prob_NV - p.prob_NV
        value_N = 0.5 * gap_NV.abs().sum(-1)
        return value_N, gap_NV.sign_().mul_(q.prob_NV).mul_(0.5) if with_grad else None


class JeffreysConfig(DivergenceConfig):
    """Declare the parameter of ``jeffreys``."""

    jeffreys_weight: Probability = Field(0.5, description="λ of jeffreys: 2λ KL(p‖q) + 2(1−λ) KL(q‖p).")


@register_divergence("jeffreys", config=JeffreysConfig)
@dataclass(frozen=True)
class Jeffreys(Divergence):
    """Compute the Jeffreys divergence, 2λ KL(p‖q) + 2(1−λ) KL(q‖p) (Jeffreys 1946). λ = ½ is the plain sum of both."""

    weight: float = 0.5

    @classmethod
    def from_config(cls, config: JeffreysConfig) -> Self:
        return cls(config.jeffreys_weight)

    def halves(self) -> Halves:
        return (4 * self.weight, KL()), (4 * (1 - self.weight), ReverseKL())

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        a = 2 * self.weight
        b = 2 * (1 - self.weight)
        if b == 0:  # a term with weight 0 is dropped, even if it is infinite
            value_N, h_NV = KL().between(p, q, with_grad)
            return a * value_N, None if h_NV is None else h_NV.mul_(a)
        if a == 0:
            value_N, h_NV = ReverseKL().between(p, q, with_grad)
            return b * value_N, None if h_NV is None else h_NV.mul_(b)
        forward_N, forward_h_NV = KL().between(p, q, with_grad)
        reverse_N, reverse_h_NV = ReverseKL().between(p, q, with_grad)
        value_N = a * forward_N + b * reverse_N
        if forward_h_NV is None or reverse_h_NV is None:
            return value_N, None
        return value_N, reverse_h_NV.mul_(b).add_(forward_h_NV, alpha=a)
