"""Forward SDEs, the Markov chains that are their discretisations, and schedules that are learned.

The names in `__all__` are names of `score_sde` too.
"""

from .chains import DDPM, SMLD
from .learned import LearnedVPSDE, MonotoneSchedule
from .linear import EDMSDE, SDE, VESDE, VPSDE, CosineSDE, LinearSDE, SubVPSDE, TrigonometricSDE
from .linear import WrongShape as WrongShape
from .linear import like as like
from .noise_levels import NoiseLevels
from .nonlinear import Diffusion, backward, paths

__all__ = [
    "DDPM", "EDMSDE", "SDE", "SMLD", "VESDE", "VPSDE", "CosineSDE", "Diffusion", "LearnedVPSDE", "LinearSDE",
    "MonotoneSchedule", "NoiseLevels", "SubVPSDE", "TrigonometricSDE", "backward", "paths",
]  # fmt: skip
