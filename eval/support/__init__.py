"""What every command of ``eval`` uses: estimates, tables and their JSON, argument types, finished cells, provenance."""
