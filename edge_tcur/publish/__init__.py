"""Publishing signed adapters and bundles as a static directory (The Update Framework)."""
