"""The embedded default: from nothing to a personalised adapter on a torch-free device, on real digits."""
