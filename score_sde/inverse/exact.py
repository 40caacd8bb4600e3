"""The exact posterior of a Gaussian mixture under a linear observation: again a Gaussian mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.closed_form import Mixture
from .operators import Observation


def posterior(model: Mixture, observation: Observation) -> Mixture:
    """The exact posterior of x given y for data from sum_k w_k N(m_k, C_k), for one observation, y (1, *observed).

    With S_k = A C_k A' + s² I and G_k = C_k A' S_k⁻¹ component k has the mean m_k + G_k (y - A m_k), the weight
    w_k N(y; A m_k, S_k) and the covariance C_k - G_k A C_k. It conditions on an exact y (s = 0) within the range of A.
    The result is a model like any other: the exact score of x_t given y, at all t.

    Raises ValueError for an observation of several examples.
    """
    if len(observation.y) != 1:
        raise ValueError(f"posterior takes one observation, got {len(observation.y)}: take y[i : i + 1]")
    k, d = model.means.shape
    means, variances = model.means.double(), model.variances.double()
    basis = torch.eye(d, dtype=means.dtype).expand(k, d, d) if model.basis is None else model.basis.double()
    covs = basis @ torch.diag_embed(variances) @ basis.mT
    matrix = observation.operator.apply(torch.eye(d, dtype=means.dtype).reshape(d, *model.shape)).flatten(1).T
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    seen = values > 1e-10 * values.max()
    a, y = values[seen, None] * vt[seen], u[:, seen].T @ observation.y.double().flatten()
    s = a @ covs @ a.T + observation.noise**2 * torch.eye(len(a), dtype=a.dtype)
    gain = torch.linalg.solve(s, a @ covs).mT
    off = y - means @ a.T
    new_means = means + (gain @ off[..., None])[..., 0]
    new_covs = covs - gain @ a @ covs
    log_density = torch.distributions.MultivariateNormal(torch.zeros_like(off), s).log_prob(off)
    weights = torch.softmax(model.log_weights.double() + log_density, 0)
    kept = weights > 1e-300  # a component's weight must not be 0
    return Mixture(model.sde, weights[kept], new_means[kept].reshape(-1, *model.shape), _symmetric(new_covs[kept]))


def _symmetric(covs: Tensor) -> Tensor:
    """Covariances without the asymmetry and the negative variances of rounding."""
    values, basis = torch.linalg.eigh((covs + covs.mT) / 2)
    return basis @ torch.diag_embed(values.clamp_min(0)) @ basis.mT
