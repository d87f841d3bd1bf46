"""Prefix caches behind one interface, for side-by-side measurements of the tree alone."""
