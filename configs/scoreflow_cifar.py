"""DDPM++ by maximum likelihood training, sub-VP SDE, on CIFAR-10.

"Baseline + likelihood weighting + importance sampling", DDPM++ (sub-VP), of Song et al. 2021b (arXiv:2101.09258), table
2; as their configs/subvp/cifar10_ddpmpp_continuous.py with the two switches on: smallest time 1e-2 in training,
sampling and likelihood, samples by the probability-flow ODE. Departures: uniform dequantisation, theirs is in training
off and in evaluation variational, by a second network that is not here; the importance weights, constant for this law,
enter the loss, which is so the bound's integral.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("subvp_cifar.py"))

    config.training.likelihood_weighting = True
    config.training.time = "importance"
    config.data.uniform_dequantization = True

    config.sampling.method = "ode"
    config.model.t_min = 1e-2
    config.sampling.t_min = 1e-2
    config.eval.t_min = 1e-2
    return config
