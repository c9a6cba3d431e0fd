"""Attention backends for vLLM: decode attention of MLA models computed by libetap.

vLLM finds this package through its entry point (`plugin.register`); nothing needs to be imported. `seams.probe()` tells which
places of the installed vLLM it hooks into.
"""

NAME = "ETAP_MLA"
"""The backend's name on vLLM's command line: `--attention-backend ETAP_MLA`."""

SPARSE_NAME = "ETAP_MLA_SPARSE"
"""That of models whose indexer chooses the tokens that a query token sees (DeepSeek-V3.2, GLM-5)."""
