"""The benchmark: our model against what people run today, on the same work, in one run.

`run.benchmark` is what `cmaclip bench` calls. docs/performance.md says how to read what it writes.
"""
