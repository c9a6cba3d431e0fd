"""FlashInfer's wrapper for paged MLA decode, computed by ETAP: `from etap_flashinfer.mla import BatchMLAPagedAttentionWrapper` in place
of `from flashinfer.mla import ...`. What differs and what is refused: docs/from-flashinfer.md."""

from etap_py import __version__ as __version__

from etap_flashinfer import mla as mla
