"""`carousel bench`: how fast and how large the worker is, beside the limits of its parts, all measured in one run.

One file a measurement; `suite.py` makes them in turn, and `report.py` tells what came out. Absolute figures belong to
the machine and its mood; the shares beside them are what to compare.
"""
