"""The `etap` attention backend for SGLang: MLA decode attention computed by libetap."""

__version__ = "0.1.0"
