"""Device profiles, one TOML each, and their loader."""
