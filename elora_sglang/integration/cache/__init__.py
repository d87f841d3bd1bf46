"""SGLang's prefix cache, backed by the core's tree, and what it is built from."""
