"""Settings of the GRPO objective."""

from dataclasses import dataclass

# What the losses of rows are divided by, by loss type: `length` of their sequence and the number of sequences,
# `constant` max_completion_length and the number of sequences, or the number of `tokens`.
DIVISORS = {
    "grpo": "length",
    "bnpo": "tokens",
    "dapo": "tokens",
    "dr_grpo": "constant",
    "cispo": "tokens",
    "gspo": "length",
}
LOSS_TYPES = tuple(DIVISORS)
KL_ESTIMATORS = ("k1", "k2", "k3")
IMPORTANCE_LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class GRPOSettings:
    """Objective of GRPO and its variants; TRL's names of the settings are given where they differ.

    For row t of sequence s, with advantage A_s, r_t = exp(logp_t - old_t) and d_t = ref_t - logp_t:

        policy_t = -min(min(r_t, delta) * A_s, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) * A_s)
        policy_t = -stop_gradient(min(r_t, epsilon_high)) * A_s * logp_t                        for cispo
        loss_t   = w_t * policy_t + beta * kl_t - entropy_coef * H_t
        w_t      = stop_gradient(min(exp(old_t - sampling_t), tis_cap)), or 1 without tis_cap
        kl_t     = -d_t (k1) | d_t^2 / 2 (k2) | exp(d_t) - d_t - 1 (k3), times r_t with use_bias_correction_kl

    Args:
        loss_type: how the losses of all rows are reduced, with |s| rows in sequence s:
            grpo     mean over sequences of (sum over rows of loss_t / |s|)        (arXiv:2402.03300)
            bnpo     sum of loss_t / number of tokens of the batch                   (TRL's bnpo)
            dapo     sum of loss_t / number of tokens of the global batch            (arXiv:2503.14476)
            dr_grpo  sum of loss_t / (number of sequences * max_completion_length)   (arXiv:2503.20783)
            cispo    the cispo policy term, summed like dapo                         (arXiv:2506.13585)
            gspo     grpo at importance level sequence                               (arXiv:2507.18071)
        epsilon_low: lower clip (TRL: epsilon).
        epsilon_high: upper clip; for cispo the cap of the ratio itself, as in TRL, so at least 1 there (5.0).
        delta: two-sided clip: cap of the unclipped ratio, or None               (arXiv:2505.07291)
        beta: weight of the KL term; above 0 it requires ref_logp.
        kl: estimator of KL(policy || reference), http://joschu.net/blog/kl-approx.html; TRL has k3 only. Use k1 for
            monitoring only: its gradient does not depend on the reference.
        use_bias_correction_kl: multiply the KL by the ratio, through which the gradient flows too; with k3 at token
            level the gradient is that of the reverse KL without bias      (arXiv:2512.02556)
        importance_level: token, or sequence: r_t = exp(mean over the sequence of logp - old)
            (TRL: importance_sampling_level).
        tis_cap: cap of the truncated importance sampling weights of the rollout engine; None: off
            (TRL: vllm_importance_sampling_mode="token_truncate" with vllm_importance_sampling_clip_max).
        entropy_coef: weight of the entropy bonus. It has the normalizer of loss_type, so that the losses of packs add
            up. TRL always takes the mean over tokens, which differs for grpo, gspo and dr_grpo.
        temperature: divides the logits before the softmax in linear_grpo_loss; grpo_loss ignores it.
        max_completion_length: length in dr_grpo's normalizer.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    loss_type: str = "grpo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl: str = "k3"
    use_bias_correction_kl: bool = False
    importance_level: str = "token"
    tis_cap: float | None = None
    entropy_coef: float = 0.0
    temperature: float = 1.0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        _one_of("loss_type", self.loss_type, LOSS_TYPES)
        _one_of("kl", self.kl, KL_ESTIMATORS)
        _one_of("importance_level", self.importance_level, IMPORTANCE_LEVELS)
        _require(0 <= self.epsilon_low <= 1, "epsilon_low", self.epsilon_low, "between 0 and 1")
        _require(self.epsilon_high >= 0, "epsilon_high", self.epsilon_high, "at least 0")
        if self.loss_type == "cispo":
            wanted = "at least 1 for cispo, where it caps the ratio itself (5.0 is usual)"
            _require(self.epsilon_high >= 1, "epsilon_high", self.epsilon_high, wanted)
            _require(self.delta is None, "delta", self.delta, "None for cispo, whose ratio has its own cap")
        _require(self.delta is None or self.delta > 1, "delta", self.delta, "above 1, or None")
        _require(0 <= self.beta < float("inf"), "beta", self.beta, "at least 0 and finite")
        _require(self.tis_cap is None or self.tis_cap > 0, "tis_cap", self.tis_cap, "above 0, or None")
        _require(abs(self.entropy_coef) < float("inf"), "entropy_coef", self.entropy_coef, "finite")
        _require(0 < self.temperature < float("inf"), "temperature", self.temperature, "above 0 and finite")
        length = self.max_completion_length
        _require(length is None or length > 0, "max_completion_length", length, "above 0, or None")
        if self.loss_type == "dr_grpo":
            _require(length is not None, "max_completion_length", length, "given for dr_grpo")

    @property
    def divisor(self) -> str:
        """Divisor of the losses of rows, an entry of DIVISORS."""
        return DIVISORS[self.loss_type]

    @property
    def sequence_level(self) -> bool:
        """True if the importance ratio is computed per sequence."""
        return self.loss_type == "gspo" or self.importance_level == "sequence"


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; known: {', '.join(known)}")


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
