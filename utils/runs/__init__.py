"""What keeps a training run safe and publishes its results; each module imports only from those above it.

1. ``machine``     what the machine can do, failures explained, and the versions a result is quoted with
2. ``checkpoint``  everything a stopped run needs to continue, in one file
3. ``folder``      a run's folder: one process at a time, files replaced whole, a copy on a drive
4. ``weights``     the trained network as a file that describes itself
5. ``figures``     every figure of ``Results/``, drawn from a run's own objects
6. ``ranks``       several processes that train one run
7. ``report``      metrics.json, training_logs.md, the README's tables, and ``Results/``
8. ``job``         the one way to train, from the range test to the results
9. ``door``        what all command lines share

The lesson's own modules, ``utils/*.py``, never import from here.
"""
