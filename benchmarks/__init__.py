"""What the README's speed table is made with: ``python -m benchmarks.speed``.

1. ``reference``  the usual way to train this network: the baseline
2. ``workloads``  one measured thing each: training, a step, evaluation, augmentation, a matrix product
3. ``speed``      runs them side by side, prints the table, writes the JSON
"""
