"""Live servers under load.

``player`` drives a server; ``chat`` and ``paper_traffic`` make what it plays; ``evaluation_model`` is what is served.
``launch`` says how each compared server is started, ``rig`` keeps them and measures cells. On top, ``comparison`` plays
at shares of a baseline's capacity, ``rates`` at given rates, and ``report`` has the tables.
"""
