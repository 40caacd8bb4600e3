"""Guidance: models in, a model out, so that no sampler has a condition argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Estimate, ScoreModel


class Guided(ScoreModel):
    """reference + scale (model - reference), in data and noise alike."""

    def __init__(self, model: ScoreModel, reference: ScoreModel, scale: float) -> None:
        super().__init__(model.sde)
        self.model, self.reference, self.scale = model, reference, scale

    def forward(self, x: Tensor, t: Tensor) -> Estimate:
        a, b = self.reference(x, t), self.model(x, t)
        return Estimate(torch.lerp(a.data, b.data, self.scale), torch.lerp(a.noise, b.noise, self.scale), b.sigma)


def guide(model: ScoreModel, reference: ScoreModel, scale: float) -> ScoreModel:
    """Classifier-free guidance and autoguidance: scale 0 is `reference`, 1 is `model`, above 1 extrapolates.

    Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, whose w is scale - 1. Raises ValueError where the SDEs differ.
    """
    if model.sde != reference.sde:
        raise ValueError(f"both models must share one SDE, got {model.sde} and {reference.sde}")
    return Guided(model, reference, scale)
