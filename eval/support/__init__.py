"""What every command of ``eval`` uses: estimates, tables and their JSON, argument types, finished cells, provenance,
and stand-ins for what takes a model or a GPU to have."""
