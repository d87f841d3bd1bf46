"""The demo model and adapters that ``make serve`` and the tests use."""
