"""Slots and their bytes: views of the device pool, the layout of adapters in it, the host pool."""
