"""What keeps a run and publishes it; each module imports only from those above it. The lesson's modules never do.

1. ``cli``         for every command line: one line for an error, an exit code, flags made from Config
2. ``files``       files written whole
3. ``machine``     its memory, and what a result is quoted with
4. ``checkpoint``  a run's folder: a lock, an intact checkpoint at any moment, a copy on a drive
5. ``weights``     the trained network as a file that describes itself
6. ``ranks``       several processes that train one run
7. ``report``      metrics.json, training_logs.md, the README's tables, and ``Results/``
8. ``figures``     every figure of ``Results/``
9. ``job``         the one way to train, from the range test to the results
"""
