"""How well the recipe does over many seeds, and what each of its parts is worth.

variants.py     the recipe, and the recipe without one part at a time
__main__.py     python -m experiments seeds | ablations | table | compare: makes runs, each in its own folder
tables.py       from the records of all runs to tables, figures and pages
degradation.py  how fast plain and residual networks of growing depth train
results/        the record of each run that was made, and what is generated from them
"""
