"""Out-of-tree SGLang platform that serves on any CPU."""
