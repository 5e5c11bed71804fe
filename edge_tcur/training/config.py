"""The settings of a training run; declared in `edge_tcur.settings`, which can be read without torch."""

from edge_tcur.settings import TrainConfig, config_from_dict, read_config

__all__ = ["TrainConfig", "config_from_dict", "read_config"]
