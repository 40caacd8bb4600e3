"""Eight Gaussians in the plane with the VE SDE and the PC sampler of Song et al. 2021.

As vp_toy in all else; sigma_max is some four times the largest distance between data; Song & Ermon 2020 (technique
1, arXiv:2006.09011) advise at least that distance.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_toy.py"))
    config.training.sde = "vesde"
    config.sampling.predictor = "reverse_diffusion"
    config.sampling.corrector = "ald"  # norms, which set the step of "langevin", mislead in two dimensions
    config.sampling.t_min = 1e-5
    config.model.sigma_max = 10.0
    config.model.label = "sigma"
    config.model.embedding_type = "fourier"
    config.model.fourier_scale = 1.0
    return config
