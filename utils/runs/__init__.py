"""What keeps a training run safe and publishes what came out of it, in the order the modules build on each other.

1. ``folder``      a run's folder: one process at a time, files replaced whole, a mirror elsewhere
2. ``checkpoint``  all that a stopped run needs to go on
3. ``weights``     the trained network as a file that describes itself
4. ``figures``     every figure of ``Results/``, drawn from a run's own objects
5. ``report``      metrics.json, training_logs.md and the README's tables
6. ``job``         the one way to train, from the range test to the published files

The lesson's own modules, ``utils/*.py``, never import from here.
"""
