"""``jbn bench``: is it faster on this device, for this shape?

What each file holds: ``engine`` the turns that all contestants take, and what follows from their times;
``contestants`` every batch norm in one form; ``in_jax`` and ``torch_program`` chains of calls of it, ``torch_process``
the way to the latter: the scripts of ``benchmarks/`` import these. ``options`` what can be asked, ``compare`` a run,
``display`` what is shown.
"""
