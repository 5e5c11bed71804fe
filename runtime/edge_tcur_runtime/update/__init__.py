"""Over-the-air updates of adapters: The Update Framework (python-tuf), and what it leaves to its user."""
