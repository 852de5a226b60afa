"""What is counted of preferred and judged answers: rewards, margins, accuracy with its bound, and lengths.

Preference tuning lengthens answers, and annotators prefer long ones: so accuracy stands beside that of "the longer one
wins", and the tokens by which the preferred answers are longer are counted. What this leaves out: the losses.
"""

from __future__ import annotations

import math

from torch import Tensor

from minicpm.train.work import add_sums

Sums = dict[str, tuple[float, float]]


class PreferenceSums:
    """Named sums of some answers; `heldout` turns them into numbers for people."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.sums: Sums = {}

    def pairs(
        self, losses: Tensor, chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor
    ) -> Sums:
        """Return the sums of pairs, from losses, log ratios and tokens, (n) each."""
        chosen, rejected = chosen.detach(), rejected.detach()
        values = {
            "loss": losses.detach(),
            "margin": self.beta * (chosen - rejected),
            "accuracy": (chosen > rejected).float(),
            "reward/chosen": self.beta * chosen,
            "reward/rejected": self.beta * rejected,
            # A tie is half a win: else "the shorter one" would seem to win it.
            "longer_wins": ((chosen_tokens > rejected_tokens).float() + (chosen_tokens >= rejected_tokens).float()) / 2,
            "tokens/chosen": chosen_tokens.float(),
            "tokens/rejected": rejected_tokens.float(),
            # Of the answer that the tuned model's reward prefers, less the other: above 0, it likes length.
            "tokens/preferred_minus_other": (chosen_tokens - rejected_tokens).float() * (chosen - rejected).sign(),
        }
        return {name: (float(value.double().sum()), float(len(value))) for name, value in values.items()}

    def judged(self, losses: Tensor, log_ratios: Tensor, is_good: Tensor, drift: Tensor) -> Sums:
        """Return the sums of judged answers, from losses, log ratios and verdicts, (n) each, and the drift."""
        rewards = self.beta * log_ratios.detach()
        above = (rewards > self.beta * drift) == is_good
        values = {
            "loss": losses.detach(),
            "accuracy": above.float(),
            "reward/good": rewards[is_good],
            "reward/bad": rewards[~is_good],
            "drift": drift[None],
        }
        return {name: (float(value.double().sum()), float(len(value))) for name, value in values.items()}

    def add(self, sums: Sums) -> None:
        """Add the sums of more answers."""
        add_sums(self.sums, sums)

    def heldout(self) -> dict[str, float]:
        """Return the means as held-out measurements, and the lower end of the accuracy's 95 % interval."""
        found = {f"heldout_{name}": value / count for name, (value, count) in self.sums.items() if count}
        wins, count = self.sums["accuracy"]
        return found | {"heldout_accuracy_low": wilson_low(wins, count), "heldout_items": count}


def wilson_low(wins: float, count: float, z: float = 1.96) -> float:
    """Return the lower end of Wilson's interval for a share of `wins` among `count`; 0 where there are none.

    Source: Wilson, Probable inference (1927).
    """
    if not count:
        return 0.0
    share = wins / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count)


def describe_measured(found: dict[str, float]) -> str:
    """Return the line that a person reads."""
    text = (
        f"held-out loss {found['heldout_loss']:.4f}, accuracy {found['heldout_accuracy']:.3f} "
        f"(95 %: above {found['heldout_accuracy_low']:.3f}, {found['heldout_items']:.0f} items)"
    )
    if "heldout_margin" in found:
        text += (
            f", margin {found['heldout_margin']:.4f}; the longer answer wins {found['heldout_longer_wins']:.3f}; the "
            f"preferred one is {found['heldout_tokens/preferred_minus_other']:+.1f} tokens longer"
        )
    return text
