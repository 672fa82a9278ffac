"""How fast is it: ours beside the usual way, on one machine in one run.

1. ``reference``  the usual way to train this network: the baseline
2. ``workloads``  one measured thing each: training, a step, evaluation, augmentation, a matrix product
3. ``speed``      ``python -m benchmarks.speed`` runs them side by side and makes the README's tables
4. ``gpu``        ``python -m benchmarks.gpu`` is everything that takes a GPU to see, in one command
"""
