"""What is compared: objectives and data sets, each as what its config has beside the base's, in command-line spelling.

A row more is an experiment more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path(__file__).parents[2] / "configs"


class Data(NamedTuple):
    """A data set: its base config in configs/, what the laboratory sets there, and a full run's steps."""

    label: str
    config: str
    settings: Mapping[str, str]
    steps: int


class Objective(NamedTuple):
    """An objective: settings for every data set and those for pixels alone, and its line in the pictures."""

    label: str
    settings: Mapping[str, str]
    colour: str
    dashes: str = "-"
    pixels: Mapping[str, str] | None = None


# Small, short and everywhere alike: times end where noise is a hundredth of the data, be they a chain's or continuous.
COMMON = {"device": "cpu", "model.t_min": "1e-3", "model.num_scales": "1000", "training.low_discrepancy": "true"}
PLANE = {
    **COMMON,
    "training.batch_size": "256",
    "training.time": "uniform",
    "model.hidden": "64",
    "model.ema_halflife": "10000",
    "optim.lr": "6e-3",
    "optim.beta2": "0.99",
    "optim.warmup": "50",
    "optim.decay": "0.7",
}
DIGITS = {
    **COMMON,
    "training.batch_size": "64",
    "training.time": "uniform",
    "training.channels_last": "false",
    "model.ema_halflife": "5000",
}

DATA: dict[str, Data] = {
    "ring": Data("eight Gaussians", "vp_toy", PLANE | {"data.dataset": "ring", "model.sigma_data": "0.71"}, 600),
    "moons": Data("two moons", "vp_toy", PLANE | {"data.dataset": "moons", "model.sigma_data": "0.57"}, 600),
    "checkerboard": Data(
        "checkerboard", "vp_toy", PLANE | {"data.dataset": "checkerboard", "model.sigma_data": "0.58"}, 600
    ),
    "swiss_roll": Data("swiss roll", "vp_toy", PLANE | {"data.dataset": "swiss_roll", "model.sigma_data": "0.49"}, 600),
    "digits": Data("digits", "vp_digits", DIGITS, 400),
}

CHAIN = {"training.continuous": "false", "sampling.grid": "uniform"}
LEARNED = CHAIN | {"model.learned_variance": "true", "sampling.variance": "learned"}
LOG_SNR = {"training.time": "log_snr"}
LEVELS = {"data.uniform_dequantization": "false"}  # of the chains' bound, whose decoder takes the levels as they are

OBJECTIVES: dict[str, Objective] = {
    "simple": Objective("denoising, t uniform", {}, "tab:blue"),
    "log_snr": Objective("denoising, log SNR uniform", LOG_SNR, "tab:blue", "--"),
    "likelihood": Objective("likelihood weighting", {"training.likelihood_weighting": "true"}, "tab:cyan"),
    "importance": Objective(
        "likelihood weighting, importance sampling",
        {"training.likelihood_weighting": "true", "training.time": "importance"},
        "tab:cyan",
        "--",
    ),
    "soft_truncation": Objective(
        "likelihood weighting, soft truncation",
        {
            "training.likelihood_weighting": "true",
            "training.time": "importance",
            "training.soft_truncation": "2",
        },
        "tab:cyan",
        ":",
    ),
    "vdm": Objective(
        "VDM, learned schedule",
        {
            "training.sde": "learned",
            "training.likelihood_weighting": "true",
            "model.t_min": "0",
            "model.gamma_min": "-9.2",
        },
        "tab:green",
    ),
    "ddpm": Objective("DDPM, L_simple", CHAIN, "tab:purple"),
    "hybrid": Objective(
        "Improved DDPM, L_hybrid", LEARNED | {"training.objective": "hybrid"}, "tab:purple", "--", LEVELS
    ),
    "vlb": Objective(
        "Improved DDPM, L_vlb",
        LEARNED | {"training.objective": "vlb", "training.time": "second_moment"},
        "tab:purple",
        ":",
        LEVELS,
    ),
    "ncsn": Objective("NCSN, σ² weighting", CHAIN | {"training.sde": "vesde", "model.sigma_max": "10"}, "tab:pink"),
    "implicit": Objective("implicit", LOG_SNR | {"training.objective": "implicit"}, "tab:red"),
    "sliced": Objective("sliced", LOG_SNR | {"training.objective": "sliced"}, "tab:orange"),
    "sliced_vr": Objective(
        "sliced, variance reduced", LOG_SNR | {"training.objective": "sliced_vr"}, "tab:orange", "--"
    ),
    "finite_difference": Objective(
        "sliced, finite differences", LOG_SNR | {"training.objective": "finite_difference"}, "tab:olive"
    ),
}


def affordable(data: str, objective: str) -> bool:
    """Whether the objective is run on the data set: the exact trace on digits would be 64 products in every step."""
    return (data, objective) != ("digits", "implicit")
