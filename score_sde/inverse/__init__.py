"""Inverse problems with an unconditional model: what is x, given y = A x + noise?

`operators` has the operators A, `models` the models of x given y, `samplers` the samplers conditioned on y, `exact` the
exact posterior of Gaussians and mixtures.
"""

from .exact import posterior
from .models import ddnm, dps, moment_matching, pigdm
from .operators import Average, Blur, Dense, Grey, Linear, Mask, Observation, Operator, Spectral, observe
from .samplers import Particles, Projected, twisted

__all__ = [
    "Average", "Blur", "Dense", "Grey", "Linear", "Mask", "Observation", "Operator", "Particles", "Projected",
    "Spectral", "ddnm", "dps", "moment_matching", "observe", "pigdm", "posterior", "twisted",
]  # fmt: skip
