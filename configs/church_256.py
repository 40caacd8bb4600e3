"""NCSN++ with the VE SDE on LSUN church outdoor at 256x256: 65.6 million parameters.

Follows appendix H of Song et al. 2021 and score_sde's configs/ve/church_ncsnpp_continuous.py. It reads a folder of
images, as in --config.data.path=church_outdoor_train, whose central squares it resizes. Departures: a folder instead of
TensorFlow Datasets, with Lanczos' filter; a tenth of it is held out unless it has train/ and test/. To fit batches of
64 into memory set training.accumulate.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("ve_cifar.py"))

    config.training.n_iters = 2_400_000
    config.training.batch_size = 64
    config.training.snapshot_freq = 50_000

    sampling = config.sampling
    sampling.snr = 0.075
    sampling.steps = 2000

    data = config.data
    data.dataset = "files"
    data.image_size = 256

    model = config.model
    model.sigma_max = 380.0
    model.ch_mult = (1, 1, 2, 2, 2, 2, 2)
    model.num_res_blocks = 2
    model.progressive = "output_skip"
    model.progressive_input = "input_skip"
    model.dropout = 0.0
    return config
