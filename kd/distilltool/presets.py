"""The predefined containers under one name. Own entries count from then on: `MATCH_LOSS_MAP["mine"] = f`."""

from kd.distilltool.matches import ADAPTOR_KEYS, FEATURES, KD_LOSS_MAP, MATCH_LOSS_MAP
from kd.distilltool.projections import PROJ_MAP

__all__ = ["ADAPTOR_KEYS", "FEATURES", "KD_LOSS_MAP", "MATCH_LOSS_MAP", "PROJ_MAP"]
