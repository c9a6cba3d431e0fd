"""What `scripts/demo.py` is made of: a corpus, a tokenizer, a small MLA model and a server to watch over."""

import os

# Before PyTorch is imported, here and in the servers: OpenMP threads that spin while they wait take the cores from
# libetap's own threads, and from whatever else a small machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
