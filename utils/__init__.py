"""Session 10's modules, in reading order.

1. ``config``      every hyperparameter, once
2. ``runtime``     seeds, device, precision, versions
3. ``transforms``  augmentation: one image at a time (Albumentations) and its batched twin
4. ``dataset``     CIFAR-10 as uint8 arrays, and the loaders
5. ``lr_finder``   the LR range test: LRMIN and LRMAX
6. ``schedule``    the one-cycle policy
7. ``engine``      train, evaluate, fit
8. ``checkpoint``  save and resume
9. ``analysis``    predictions, mistakes, per-class accuracy
10. ``plotting``   arrays in, figures out
11. ``report``     metrics.json, training_logs.md and the README's tables
12. ``lesson``     the small experiments beside the main job
13. ``colab``      set-up on Google Colab, and nowhere else

Each module imports only from those above it.
"""
