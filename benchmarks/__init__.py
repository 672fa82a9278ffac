"""How fast is it: the baseline beside this project, on one machine in one run. See benchmarks/README.md.

1. ``reference``  the baseline: the network trained as it is usually written
2. ``speed``      ``python -m benchmarks.speed`` measures both and makes the tables
"""
