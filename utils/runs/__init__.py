"""What keeps a training run safe and publishes what came out of it; each module imports only from those above it.

1. ``checkpoint``  all that a stopped run needs to go on, in one file
2. ``folder``      a run's folder: one process at a time, files replaced whole, a mirror elsewhere
3. ``weights``     the trained network as a file that describes itself
4. ``figures``     every figure of ``Results/``, drawn from a run's own objects
5. ``ranks``       several processes that train one run
6. ``report``      metrics.json, training_logs.md, the README's tables, and ``Results/``
7. ``job``         the one way to train, from the range test to the results
8. ``door``        what every command line does alike

The lesson's own modules, ``utils/*.py``, never import from here.
"""
