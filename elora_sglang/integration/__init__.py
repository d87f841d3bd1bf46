"""The only code that imports sglang."""
