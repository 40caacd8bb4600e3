"""Improved DDPM on CIFAR-10: a chain of 4000 steps, cosine schedule, learned variances, L_hybrid.

Nichol & Dhariwal 2021 (arXiv:2102.09672), table 2 (500,000 iterations), with the flags that the README of
openai/improved-diffusion gives for its CIFAR-10 model. For their L_vlb set training.objective=vlb and
training.time=second_moment; for sampling in fewer steps, which their section 4 does without loss, sampling.steps=100.
52.5 million parameters. Departures: DDPM's initialisation and time embedding; the network's label is 999 t,
theirs is 1000 (t - 1/4000); convolutions of stride 2 pad below and to the right alone. The whole bound takes 4000
evaluations per image; eval.terms=100 draws 100 of them.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("ddpm_cifar.py"))

    training = config.training
    training.sde = "cosine"
    training.objective = "hybrid"
    training.n_iters = 500_000

    sampling = config.sampling
    sampling.variance = "learned"
    sampling.clip_denoised = True
    sampling.steps = 4000

    config.eval.clip_denoised = True
    config.data.random_flip = False

    model = config.model
    model.label = "time"
    model.num_scales = 4000
    model.learned_variance = True
    model.num_res_blocks = 3
    model.attn_resolutions = (16, 8)
    model.dropout = 0.3
    model.scale_shift = True
    model.num_heads = 4
    model.attend_each = True

    optim = config.optim
    optim.optimizer = "AdamW"
    optim.lr = 1e-4
    optim.warmup = 0
    optim.grad_clip = -1.0
    return config
