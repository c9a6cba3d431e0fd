"""Where the time of MLA decode goes: a model that explains measurements and predicts cards that were not measured."""
