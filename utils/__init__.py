"""Session 10's modules, in reading order; each imports only from those above it.

1. ``runtime``     errors, seeds, device, precision, files written whole
2. ``sources``     where the images come from: the official archive, class folders, digits
3. ``config``      every hyperparameter, once
4. ``transforms``  augmentation: one image at a time (Albumentations), and its batched twin
5. ``dataset``     CIFAR-10 as uint8 arrays
6. ``loaders``     batches on the device
7. ``schedule``    the one-cycle policy
8. ``metrics``     loss and accuracy: of an epoch, and of a whole run
9. ``engine``      train, evaluate, fit
10. ``lr_finder``  the LR range test: LRMIN and LRMAX
11. ``analysis``   predictions, mistakes, per-class accuracy
12. ``plotting``   arrays in, figures out
13. ``lesson``     the small experiments beside the main run
14. ``colab``      set-up in a hosted notebook
15. ``runs``       keeps a run safe and publishes it; not part of the lesson
"""
