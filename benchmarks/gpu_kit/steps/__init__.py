"""One module for each step; run as `python -m benchmarks.gpu_kit.steps.NAME RESULT [--dry-run]`."""
