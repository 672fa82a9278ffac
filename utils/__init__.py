"""Session 10's modules, in reading order; each imports only from those above it.

1. ``runtime``     seeds, device, precision, versions, and the one base of all errors
2. ``sources``     where pixels come from: the official archive, class folders, digits
3. ``config``      every hyperparameter, once
4. ``transforms``  augmentation: one image at a time (Albumentations) and its batched twin
5. ``dataset``     CIFAR-10 as uint8 arrays
6. ``loaders``     batches on the device
7. ``schedule``    the one-cycle policy
8. ``engine``      train, evaluate, fit
9. ``lr_finder``   the LR range test: LRMIN and LRMAX
10. ``analysis``   predictions, mistakes, per-class accuracy
11. ``plotting``   arrays in, figures out
12. ``lesson``     the small experiments beside the main job
13. ``colab``      set-up in a hosted notebook, and nowhere else
14. ``runs``       what keeps a run safe and publishes it; not a part of the lesson
"""
