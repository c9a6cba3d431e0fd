"""`etap report`: one HTML page and PNGs from the file that `etap bench` wrote.

summary computes every number, limits says what bounds a step, figures draws, page fills the template.
"""
