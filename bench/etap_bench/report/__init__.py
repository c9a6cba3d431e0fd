"""`etap report`: one HTML page and PNGs from the file that `etap bench` wrote.

summary computes the numbers of a workload, limits says what bounds a call, tiles answers the three questions, tables and figures show what
that rests on, page puts it together. rest and prices are what a person adds; text writes numbers as people read them.
"""
