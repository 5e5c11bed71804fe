"""Device profiles, one TOML each, and their loader."""

from edge_tcur_devices.loader import list_profiles, load_profile
from edge_tcur_runtime.formats.device import DeviceProfile

__all__ = ["DeviceProfile", "list_profiles", "load_profile"]
