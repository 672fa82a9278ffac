"""What keeps a training run safe and publishes what came out of it; each module imports only from those above it.

1. ``machine``     what the machine can do, failures explained, and the versions a result is quoted with
2. ``checkpoint``  all that a stopped run needs to go on, in one file
3. ``folder``      a run's folder: one process at a time, files replaced whole, a mirror elsewhere
4. ``weights``     the trained network as a file that describes itself
5. ``figures``     every figure of ``Results/``, drawn from a run's own objects
6. ``ranks``       several processes that train one run
7. ``report``      metrics.json, training_logs.md, the README's tables, and ``Results/``
8. ``job``         the one way to train, from the range test to the results
9. ``door``        what every command line does alike

The lesson's own modules, ``utils/*.py``, never import from here.
"""
