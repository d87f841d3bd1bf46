"""The life of an adapter in SGLang's processes: names, load, replace, unload."""
