"""The balls of an evaluation: the run's own, and others. A result in another ball has a name such as "pgd20@2/255"."""

from dataclasses import dataclass
from fractions import Fraction

from ltat_fast.attacks.balls import Norm
from ltat_fast.errors import UserError


def exact_fraction(text: str) -> Fraction:
    """The exact value of "8/255" or "0.1". Raises ValueError or ZeroDivisionError for anything else."""
    numerator, _, denominator = text.partition("/")
    return Fraction(numerator) / Fraction(denominator or 1)


@dataclass(frozen=True)
class Threat:
    """A ball around each image. eps: its radius as it was written, for example "8/255"."""

    eps: str
    norm: Norm = "linf"

    @property
    def radius(self) -> float:
        return float(exact_fraction(self.eps))

    def is_like(self, other: "Threat") -> bool:
        """Whether both are the same ball; "8/255" and "16/510" are."""
        return self.norm == other.norm and exact_fraction(self.eps) == exact_fraction(other.eps)

    @property
    def suffix(self) -> str:
        """What the name of an attack in this ball ends with, where it is not the ball of the run."""
        return f"@{self.eps}" if self.norm == "linf" else f"@{self.norm}:{self.eps}"

    def __str__(self) -> str:
        return f"{'L_inf' if self.norm == 'linf' else 'L2'}, eps {self.eps}"


def parse_threats(radii: str, norm: Norm) -> list[Threat]:
    """Return the balls of a comma-separated list of radii such as "2/255,4/255", each once.

    Raises UserError for a radius that is not a positive number, or above 1 for "linf".
    """
    threats: list[Threat] = []
    for text in ("".join(part.split()) for part in radii.split(",") if part.strip()):
        try:
            radius = exact_fraction(text)
        except (ValueError, ZeroDivisionError):
            raise UserError(f"--eps {text!r} is not a number or fraction such as 0.1 or 8/255") from None
        if radius <= 0 or (norm == "linf" and radius > 1):
            limits = "above 0 and at most 1" if norm == "linf" else "above 0"
            raise UserError(f"--eps must be {limits}, not {text}: pixels are in [0, 1]")
        threat = Threat(text, norm)
        if not any(threat.is_like(other) for other in threats):
            threats.append(threat)
    if not threats:
        raise UserError("--eps names no radius")
    return threats


def attack_of(name: str) -> str:
    """Return the attack in the name of a result: "pgd20" for "pgd20@2/255"."""
    return name.partition("@")[0]


def suffix_of(name: str) -> str:
    """Return the ball in the name of a result as :attr:`Threat.suffix`, "" for the ball of the run."""
    return name.removeprefix(attack_of(name))
