"""Reading a user's data for training: the runtime's readers, the base's preprocessing, torch batches."""

from edge_tcur.data.batches import PreparedData, Samples, in_batches, prepare

__all__ = ["PreparedData", "Samples", "in_batches", "prepare"]
