"""CIFAR-10 at 16x16 from words: its file names hold 389 of them, such as "a tabby cat", in half an hour on a CPU.

The encoder is a folder in the form of Hugging Face; all-MiniLM-L6-v2 (22 million parameters) will do:
`huggingface-cli download sentence-transformers/all-MiniLM-L6-v2 --local-dir encoders/all-MiniLM-L6-v2`. A word or two
of each class are left out of training, to see what the model makes of words it has never met.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load

LEFT_OUT = (
    "an airliner",
    "a jumbo jet",
    "an estate car",
    "a taxi",
    "a sparrow",
    "an ostrich",
    "a house cat",
    "an alley cat",
    "a mule deer",
    "a moose",
    "a chihuahua",
    "a domestic dog",
    "a green frog",
    "a toad",
    "a stallion",
    "an appaloosa",
    "a cargo ship",
    "a speedboat",
    "a fire truck",
    "a moving van",
)


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_cifar_small.py"))
    config.training.n_iters = 6000
    config.data.image_size = 16
    config.data.leave_out = ",".join(LEFT_OUT)
    config.model.text_encoder = "encoders/all-MiniLM-L6-v2"
    config.model.text_length = 12
    config.model.scale_shift = True
    config.model.attn_resolutions = (4, 8)
    return config
