"""Tuning, many seeds and ablations of the recipe: every run logged, resumable, one table out.

    python -m experiments tune                 what each setting does, on 5,000 held-out train images, never on test
    python -m experiments seeds --publish      the recipe on all train images, fresh seeds; Results/ from the first one
    python -m experiments ablations            the recipe without one of its parts at a time, at least 3 seeds each
    python -m experiments all                  the three in that order: a job for a GPU
    python -m experiments table                table and figures again, from the log alone

``--small`` does the same with a hundred images, to try the commands on a CPU; its accuracies mean nothing.

**From tuning to a result.** LRMIN and LRMAX are found by the range test in every run; what is tuned is the rule (a factor
on what it found, another pair of suggestions). After ``tune``, read the table, put what you choose into ``utils/config.py``
and commit: that freezes the recipe. ``seeds`` and ``ablations`` take it from there and open the test set, once a run. Seeds
from 0 are for tuning, seeds from 100 for results. ``all`` leaves the recipe as it stands.

**Files**, in ``--out`` (``experiments/results``):

- ``runs.jsonl``: one JSON object a line, one line a finished run: ``key`` (of variant, settings, seed and data), ``split``
  ("validation" or "test"), ``variant``, ``shows``, ``seed``, ``config``, ``recipe`` (digest of the settings that the variant
  departs from), ``status`` ("done", or "failed" with the ``error``: the run diverged or its range test had no answer),
  ``accuracy``, ``accuracy_tta`` and ``train_accuracy`` in percent, ``loss``, ``per_class_accuracy``, ``lr_range`` as found,
  ``lr_first``, ``lr_peak`` and ``lr_last`` as used, ``weight_decay``, ``seconds`` (training), ``range_test_seconds``,
  ``total_seconds``, ``device``, ``precision``, ``versions``, ``commit``, ``data``, ``train_images``, ``eval_images``. Accuracies are
  after the last epoch, of the weights as they would be shipped (see ``utils.report.final_test``).
- ``table.json``, ``table.md``, ``tune.png``, ``ablations.png``: means, standard deviations and differences to the recipe.
- ``KEY.safetensors``: the weights of the recipe's first seed, which ``--publish`` shows. The first, never the best.

A run whose key is in the log is not repeated, whatever happened since; an interrupted one starts again. So the same
command goes on after Ctrl-C, a lost machine or a spent ``--budget-minutes``.
"""
