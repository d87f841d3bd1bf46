"""Rivals of the live comparison: stock SGLang's adapter loading and HiCache, made comparable on a CPU."""
