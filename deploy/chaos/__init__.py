"""`carousel chaos`: torments genuine workers on a genuine Kafka, then proves that nobody could tell.

`plan` draws the faults from a seed, `load` the observations; `fleet` keeps the workers running as Docker would, `watch`
sees how far they are, `faults` does the tormenting; `verify` compares with an undisturbed run, `report` tells what came
out. `run` is the whole.
"""
