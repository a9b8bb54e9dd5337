"""What proves and times the package on one GPU in a few minutes, on a machine with PyTorch and no network.

`build.py` writes the folder that travels, `run.py` runs its steps there, each a module of `steps`.
"""
