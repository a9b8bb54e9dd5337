"""CMA-CLIP (arXiv 2112.03562), which is `model.py`, among the systems."""

from __future__ import annotations

from cmaclip_fast.model import CMACLIP
from cmaclip_fast.systems import register

register("cma-clip")(CMACLIP)
