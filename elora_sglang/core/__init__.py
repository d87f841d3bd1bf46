"""Decisions: the dependency tree, the policies, admission and their invariants. Standard library only.

Many files, because each is one step between an event and the actions that answer it, and is read alone.

==================================  =================================================================================
``manager``                         events in, actions out; the only door
``admission``, ``overtaking``       who enters a batch, and who may pass whom
``swapper``, ``swap_settings``      what moves when
``waiting``                         the requests that wait
``tree``, ``policies``              what is where, and what it is worth
``actions``, ``executor``           what the manager asks for, and the loop that carries it out
``costs``, ``hints``, ``errors``    plain values
``trace``                           records events and actions, and replays them
==================================  =================================================================================
"""
