"""What commands share: estimates, tables and their JSON, argument types, finished cells, provenance, a LoRA pool."""
