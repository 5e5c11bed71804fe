"""Reading a user's data for training: the runtime's readers, the base's preprocessing, torch batches."""

from edge_tcur.data.batches import PreparedData, prepare

__all__ = ["PreparedData", "prepare"]
