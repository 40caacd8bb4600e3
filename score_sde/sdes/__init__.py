"""Forward SDEs, the Markov chains that are their discretisations, and schedules that are learned."""

from .chains import DDPM, SMLD
from .learned import LearnedVPSDE, MonotoneSchedule
from .linear import EDMSDE, SDE, VESDE, VPSDE, CosineSDE, SubVPSDE, WrongShape, like
from .noise_levels import NoiseLevels
from .nonlinear import Diffusion, backward, paths

__all__ = [
    "DDPM",
    "EDMSDE",
    "SDE",
    "SMLD",
    "VESDE",
    "VPSDE",
    "CosineSDE",
    "Diffusion",
    "LearnedVPSDE",
    "MonotoneSchedule",
    "NoiseLevels",
    "SubVPSDE",
    "WrongShape",
    "backward",
    "like",
    "paths",
]
