"""An experiment, which splits the requests of an alias between two versions of a model."""

import dataclasses
import hashlib
import secrets

# The arms of an experiment.
CHAMPION_ARM, CHALLENGER_ARM = ARMS = ("champion", "challenger")
# How the outcome of a unit is computed; see `docs/experiments.md`.
OUTCOMES = ("reward", "rating", "label")


@dataclasses.dataclass(frozen=True)
class Split:
    """The settings of an experiment, which do not change after its start.

    Attributes:
      name: The name, which no other experiment of the model has.
      salt: A random text. A different salt assigns the units differently.
      fraction: The probability that a unit is assigned to the challenger, above 0 and below 1.
      outcome: One of `OUTCOMES`.
      window: Seconds after the first image of a unit, in which its images and feedback count.
      is_shadow: Whether the challenger answers after the champion, and its answer is dropped.
    """

    name: str
    salt: str
    fraction: float
    outcome: str
    window: float
    is_shadow: bool

    def __post_init__(self):
        if not 0 < self.fraction < 1:
            raise ValueError(f"its fraction is {self.fraction}")
        if self.outcome not in OUTCOMES:
            raise ValueError(f"its outcome is {self.outcome}")
        if not 0 < self.window < float("inf"):
            raise ValueError(f"its window is {self.window}")

    def arm(self, unit: str) -> str:
        """Returns the arm of a unit; every server computes the same arm."""
        digest = hashlib.sha256(f"{self.salt}/{unit}".encode()).digest()
        is_challenger = int.from_bytes(digest[:8]) < self.fraction * 2**64
        return CHALLENGER_ARM if is_challenger else CHAMPION_ARM

    def column(self, arm: str) -> str:
        """Returns the text for an arm in the column `arm` of the request log and in headers.

        The text contains a slash, so it is never the name of an alias.
        """
        return f"{self.name}/{arm}"


def new_salt() -> str:
    """Returns a random salt."""
    return secrets.token_hex(8)


@dataclasses.dataclass(frozen=True)
class Experiment(Split):
    """An experiment with its versions and times.

    Attributes:
      model: The name of the model.
      alias: The alias whose requests are split.
      champion: The number of the version that had the alias at the start.
      challenger: The number of the other version.
      start: When the experiment started, in ISO 8601.
      end: When it ended; "" while it runs.
    """

    model: str
    alias: str
    champion: int
    challenger: int
    start: str
    end: str = ""

    @property
    def versions(self) -> dict[str, int]:
        """The number of the version of each arm."""
        return dict(zip(ARMS, (self.champion, self.challenger), strict=True))
