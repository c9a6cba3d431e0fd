"""What `scripts/demo.py` is made of: a corpus, a tokenizer, a small MLA model and a server to watch over."""
