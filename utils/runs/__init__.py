"""What keeps a training run safe and publishes its results; each module imports only from those above it.

1. ``checkpoint``  everything a stopped run needs to continue, in one file
2. ``folder``      a run's folder: one process at a time, files replaced whole, a copy on a drive
3. ``weights``     the trained network as a file that describes itself
4. ``figures``     every figure of ``Results/``, drawn from a run's own objects
5. ``ranks``       several processes that train one run
6. ``report``      metrics.json, training_logs.md, the README's tables, and ``Results/``
7. ``job``         the one way to train, from the range test to the results
8. ``door``        what all command lines share

The lesson's own modules, ``utils/*.py``, never import from here.
"""
