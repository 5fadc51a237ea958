"""``jbn bench``: is it faster on this device, for this shape?

What each file holds: ``options`` what can be asked; ``compare`` a run; ``rounds`` the turns that all
contestants take, and what follows from their times; ``in_jax`` and ``torch_program`` what is timed;
``torch_process`` the way to the latter; ``display`` what is shown.
"""
