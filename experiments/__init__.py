"""How the recipe was found and what its parts are worth: a screen, a confirmation, many seeds, ablations.

    python -m experiments screen         eleven settings at once in 12 runs, at half width, on held-out train images
    python -m experiments confirm        the best of them together, at full width, on held-out train images
    python -m experiments seeds          the recipe in utils/config.py with fresh seeds, on all train images and the test set
    python -m experiments ablations      the recipe without one of its parts at a time, likewise
    python -m experiments all            the four in that order
    python -m experiments table          tables and figures again, from the runs alone

Between ``confirm`` and ``seeds`` somebody reads the tables, puts what is chosen into ``utils/config.py`` and writes down
why: that freezes the recipe. The test set is opened after that. Seeds from 0 screen, from 50 confirm, from 100 give
results. ``all`` takes the recipe as it stands.

Each run is one call of ``utils.runs.job.run_job`` in a folder of its own, ``RUNS/STAGE-WIDTH-VARIANT-seedN``, with a
checkpoint an epoch: the same command goes on after Ctrl-C or a lost machine. A run that fails (it diverges, or its range
test has no answer) leaves ``failed.json``, and that is its result. A run that another process works on is left to it; so
on two cores, two of these commands with ``--threads 1`` share the work, and are faster than one with two threads.

Files, in RUNS/results, or with ``--publish`` in experiments/results: ``runs.json`` (a record of each run that was made,
on any machine, failed ones too), ``runs.md`` (a line a run), ``README.md`` (the page to read) and its figures.
"""
