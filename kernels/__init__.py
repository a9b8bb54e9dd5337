"""Triton kernels, one file per operator; installed as `cmaclip_fast.kernels` and imported only when used."""
