"""``lora_path`` for SGLang frontend programs."""
