"""How the recipe was found and what its parts are worth: a screen, a confirmation, many seeds, ablations.

    python -m experiments screen         eleven settings at once in 12 runs, at half width, on held-out train images
    python -m experiments confirm        the best of them together, at full width, on held-out train images
    python -m experiments seeds          the recipe in utils/config.py with fresh seeds, all train images and the test set
    python -m experiments ablations      the recipe without one of its parts at a time, likewise
    python -m experiments all            the four in that order
    python -m experiments table          tables and figures again, from the runs alone

Between ``confirm`` and ``seeds``, read the tables, put your choice into ``utils/config.py`` and write down why: that
freezes the recipe. Only then is the test set opened. Seeds from 0 screen, from 50 confirm, from 100 give results.
``all`` takes the recipe as it stands.

Each run is one call of ``utils.runs.job.run_job`` in its own folder, ``RUNS/STAGE-WIDTH-VARIANT-seedN``, with a
checkpoint after every epoch: after Ctrl-C or a lost machine, the same command goes on. A run that fails (it diverges,
or its range test has no answer) leaves ``failed.json``, and that is its result. Commands that run side by side share
the work: on two cores, two of them with ``--threads 1`` are faster than one with two threads.

Files, in RUNS/results or, with ``--publish``, in experiments/results: ``runs.json`` (a record of each run that was
made, on any machine, including failed ones), ``runs.md`` (a line a run), ``README.md`` (the page to read) and its
figures. ``--publish`` also updates the project's README.
"""
