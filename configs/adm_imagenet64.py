"""ADM on ImageNet 64x64: class-conditional, a chain of 1000 steps, cosine schedule, learned variances, L_hybrid.

Dhariwal & Nichol 2021 (arXiv:2105.05233), table 11, with the flags that the README of openai/guided-diffusion gives for
its 64x64 model: 296 million parameters. It reads a folder of images with a sub-folder per class, as in
--config.data.path=imagenet/train. Their model is guided by a classifier and trained with all labels; for
classifier-free guidance set training.condition_dropout=0.1. Departures: DDPM's initialisation; bfloat16 in place of
float16; images shrunk by Lanczos' filter.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.sde = "cosine"
    training.continuous = False
    training.objective = "hybrid"
    training.condition_dropout = 0.0
    training.n_iters = 540_000
    training.batch_size = 2048
    training.precision = "bfloat16"
    training.channels_last = True

    sampling = config.sampling
    sampling.predictor = "ancestral_sampling"
    sampling.variance = "learned"
    sampling.clip_denoised = True
    sampling.steps = 250

    config.eval.clip_denoised = True
    config.eval.batch_size = 16

    data = config.data
    data.dataset = "files"
    data.image_size = 64

    model = config.model
    model.name = "adm"
    model.label = "index"
    model.learned_variance = True
    model.class_conditional = True
    model.nf = 192
    model.ch_mult = (1, 2, 3, 4)
    model.num_res_blocks = 3
    model.attn_resolutions = (32, 16, 8)
    model.head_channels = 64
    model.dropout = 0.1

    optim = config.optim
    optim.optimizer = "AdamW"
    optim.lr = 3e-4
    optim.warmup = 0
    optim.grad_clip = -1.0
    return config
