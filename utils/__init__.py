"""Session 10's modules, in reading order; each imports only from those above it.

1. ``runtime``, ``sources``    errors, device, precision; where the pixels come from (archive, class folders, digits)
2. ``config``, ``transforms``  every hyperparameter, once; augmentation: one image at a time, and its batched twin
3. ``dataset``, ``loaders``    CIFAR-10 as uint8 arrays; batches on the device
4. ``schedule``                the one-cycle policy
5. ``metrics``, ``averaging``, ``engine``  loss and accuracy; the average of the weights; train, evaluate, fit
6. ``lr_finder``               the LR range test: LRMIN and LRMAX
7. ``analysis``, ``plotting``  predictions and mistakes; arrays in, figures out
8. ``lesson``                  the small experiments beside the main run
9. ``runs``                    keeps a run safe and publishes it; not part of the lesson
"""
