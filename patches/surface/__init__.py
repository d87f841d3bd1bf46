"""Everything of SGLang that our code leans on, found by reading both sides as text.

``patches/surface.json`` is generated: each SGLang name that we import, subclass, override, hook, call or read, with
what we rely on. ``python -m elora_sglang.patches.surface --diff OLD NEW`` says what a release changes for us.

Many files, because this is a small program analysis that nothing else shares. Read in this order: ``code``
(modules, classes and members from files), ``inference`` (which expression of ours is an SGLang object), ``uses`` (what
our code does with it), ``shape`` (what SGLang has there), ``record`` (the file), ``changes`` (two SGLangs compared),
``start`` (the check before a server starts), ``place`` (folders, wheels and versions). Nothing here imports SGLang,
so it may be a version that cannot be imported.

Helpers: ``syntax`` and ``ours`` answer small questions, ``atoms``, ``scopes`` and ``annotations`` serve ``inference``,
``conventions`` holds what SGLang means without stating it.
"""
