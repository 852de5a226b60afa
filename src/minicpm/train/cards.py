"""Graphics cards by name: their memory, and how fast their makers say that they multiply.

What this leaves out: measuring; none of them was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minicpm.errors import ConfigError

# What a program may use of a card's memory: the driver and the screen have the rest.
_USABLE = 0.94


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        name: as people call it.
        gib: its memory.
        tera_flops: 10¹² operations a second of dense 16-bit products summed in float32 (before Turing: of float32).
        has_bfloat16: whether it multiplies bfloat16 at that rate.
    """

    name: str
    gib: int
    tera_flops: float
    has_bfloat16: bool = True

    @property
    def usable_bytes(self) -> int:
        """What a run may take."""
        return int((self.gib << 30) * _USABLE)


CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        Card("1060", 6, 4.4, False), Card("1070", 8, 6.5, False), Card("1080", 8, 8.9, False),
        Card("1080ti", 11, 11.3, False), Card("2060", 6, 26, False), Card("2070", 8, 30, False),
        Card("2080", 8, 40, False), Card("2080ti", 11, 54, False), Card("t4", 16, 65, False),
        Card("v100", 32, 112, False), Card("3060", 12, 25), Card("3080", 10, 60), Card("3090", 24, 71),
        Card("4060", 8, 30), Card("4070", 12, 58), Card("4080", 16, 97), Card("4090", 24, 165),
        Card("5090", 32, 209), Card("a100", 80, 312), Card("h100", 80, 756),
    )
}  # fmt: skip


def card(name: str) -> Card:
    """Return the card that `name` means: "3090", "RTX 3090" and "rtx-3090" are the same.

    Raises:
        ConfigError: it is none of the table.
    """
    plain = "".join(c for c in name.lower() if c.isalnum())
    for prefix in ("nvidia", "geforce", "rtx", "gtx", "tesla"):
        plain = plain.removeprefix(prefix)
    if plain not in CARDS:
        raise ConfigError(f"--gpu {name!r} is not in the table; give --memory, or one of {', '.join(CARDS)}")
    return CARDS[plain]
