"""FlashInfer's wrapper for paged MLA decode, computed by ETAP: `from etap_flashinfer.mla import BatchMLAPagedAttentionWrapper` in place
of `from flashinfer.mla import ...`. What differs and what is refused: docs/from-flashinfer.md."""

from etap_flashinfer import mla as mla

__version__ = "0.1.0"
